"""Compile kernels for an H100 without one, in a process without the interpreter.

    python tests/kernels/compile_kernels.py result.json

Writes ``{variant: null or the error}``.  The interpreter runs Python, which allows what the
compiler does not: a loop variable that changes its type, for one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_medusa.triton_kernels import (
    attention_join,
    attention_kernels,
    draft,
    draft_tokens,
    float8,
    kv_compaction,
    lookup,
    scatter,
    sequential,
    tree_choice,
    walk,
)

# A benchmark's.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import synthetic_kernel

H100 = GPUTarget("cuda", 90, 32)

ATTENTION = {
    "out": "*bf16", "q": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "block_table": "*i32",
    "query_start_loc": "*i32", "seq_lens": "*i32", "tree_masks": "*i64", "workspace": "*fp32",
    "counters": "*i32", "lse": "*fp32",
}  # fmt: skip
FLOAT8 = ATTENTION | {"q": "*fp8e4nv", "k_cache": "*fp8e4nv", "v_cache": "*fp8e4nv",
                      "k_scale": "*fp32", "v_scale": "*fp32", "q_scale": "*fp32"}  # fmt: skip
SHAPE = {
    "SCALE": 0.125, "SOFT_CAP": 0.0, "WINDOW": 0, "SCALES": 1, "NUM_KV_HEADS": 2, "GROUP": 4,
    "HEAD_SIZE": 32, "PADDED_HEAD": 32, "BLOCK_SIZE": 16, "BLOCK_ROWS": 16, "BLOCK_KEYS": 32,
    "SECOND_WORD": 0, "MIN_TILES": 1, "IS_SPLIT": True, "LAST_JOINS": True,
    "JOIN_ROWS": 8, "IN_FLIGHT": 8, "CHAINED": False, "BLOCK_STRIDE": 2048, "SLOT_STRIDE": 64,
    "HEAD_STRIDE": 1024, "V_OFFSET": 32,
    "sinks": None, "k_scale": None, "v_scale": None, "q_scale": None,
}  # fmt: skip
CHAINED = SHAPE | {"LAST_JOINS": False, "CHAINED": True}
WIDE = SHAPE | {"SECOND_WORD": 128}
SCALED = {key: value for key, value in SHAPE.items() if not key.endswith("_scale")}
COMPACTION = dict.fromkeys(("layer_ptrs", "idx_mapping", "root_positions", "path_masks"), "*i64")
COMPACTION |= {"block_table": "*i32"}
MOVE = {"WORD": tl.int64, "BLOCK_SIZE": 16, "ALIGNMENT": 16, "CHUNKS": 2, "BLOCK": 128, "MOVES": 8,
        "LAYERS": 2}  # fmt: skip
SCATTER = {
    "positions": "*i64", "step_masks": "*i64", "query_start_loc": "*i32", "cu_num_logits": "*i32",
    "idx_mapping": "*i64", "depths": "*i32", "masks": "*i64",
}  # fmt: skip
LONG = [
    "out_tokens", "out_path_masks", "out_root_positions", "out_last_rows", "out_flat_rows",
    "last_sampled", "sampled", "draft_tokens", "positions", "idx_mapping",
]  # fmt: skip
SHORT = [
    "out_num_sampled", "out_num_rejected", "num_computed_tokens", "total_len", "all_token_ids",
    "output_counts", "cu_num_logits", "seq_lens", "parents", "accept_limits", "prefill_len",
]  # fmt: skip
WALK = dict.fromkeys(LONG, "*i64") | dict.fromkeys(SHORT, "*i32")
WALK |= {"out_hidden": "*bf16", "hidden_states": "*bf16"}
DRAFT = {"out": "*i64", "counters": "*i32", "maxima": "*i32", "logits": "*bf16",
         "node_columns": "*i64"}  # fmt: skip
TOP = {"tokens": "*i64", "log_probs": "*fp32", "counters": "*i32", "maxima": "*i32",
       "sums": "*fp32", "picks": "*i32", "logits": "*bf16", "weights": "*fp32",
       "token_map": "*i64", "columns": "*i32"}  # fmt: skip
RANKS = {"NUM_TOP": 12, "MAX_TOP": 128, "GROUP": 128, "GROUPS_PER_PROGRAM": 32, "PADDED_TOP": 16,
         "PADDED_GROUPS": 256, "PADDED_CHUNKS": 8}  # fmt: skip
NOISE = {"seeds": "*i64", "temperatures": "*fp32", "lengths": "*i32", "slots": "*i64",
         "spread": "fp32"}  # fmt: skip
NO_NOISE = dict.fromkeys(("seeds", "temperatures", "lengths", "slots"), None)
NO_NOISE |= {"spread": 1.0, "DEPTH_STEP": 0}
PATHS = dict.fromkeys(("out", "hidden", "embeddings"), "*bf16")
PATHS |= dict.fromkeys(("tokens", "root_tokens", "paths"), "*i64")
UPDATE = dict.fromkeys(("out", "states", "update", "bias"), "*bf16")
PRODUCT = dict.fromkeys(("out", "inputs", "states", "bias"), "*bf16")
PRODUCT |= {"weight": "*fp8e4nv", "scale": "*fp32"}
BLOCKS = {"BLOCK_OUTPUTS": 32, "BLOCK_ROWS": 16, "BLOCK_SIZE": 128, "IS_EVEN": True}
NO_LAYER = {"states": None, "bias": None}
CHOICE = dict.fromkeys(("out", "masks", "tokens", "slots", "fixed_masks", "chain_tokens"), "*i64")
CHOICE |= dict.fromkeys(("log_probs", "chain_costs"), "*fp32")
CHOICE |= dict.fromkeys(
    ("parents", "depths", "scratch", "columns", "ancestors", "fixed_slots", "fixed_columns",
     "fixed_parents", "fixed_depths", "chain_matches"), "*i32")  # fmt: skip
CHOSEN = {"DEPTH": 4, "LENGTH": 0, "NUM_COLUMNS": 128, "NUM_NODES": 63, "PADDED_NODES": 64,
          "PADDED_CANDIDATES": 1024}  # fmt: skip
CHILDREN = dict.fromkeys(("drawn", "positions", "slots", "seeds", "lowest", "highest"), "*i64")
CHILDREN |= dict.fromkeys(("out_tokens", "tokens", "cu_rows", "parents"), "*i32")
LOOKUP = {"chain": "*i64", "slots": "*i64"}
LOOKUP |= dict.fromkeys(("matches", "keys", "counters", "history", "lengths"), "*i32")


def walk_rows(rows: int) -> dict[str, Any]:
    """Constants of a walk over trees of so many rows."""
    return {
        "HIDDEN_SIZE": 64, "HIDDEN_BLOCK": 64, "NUM_COLUMNS": rows, "NUM_ROWS": rows,
        "NUM_WORDS": rows // 64, "PADDED_ROWS": rows,
    }  # fmt: skip


# variant -> kernel, types of its pointers, constants, warps
VARIANTS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "attention": (attention_kernels.tree_attention_kernel, ATTENTION, SHAPE, 4),
    "attention, two words, window": (
        attention_kernels.tree_attention_kernel, ATTENTION, WIDE | {"WINDOW": 100}, 4
    ),
    "attention, float8": (attention_kernels.tree_attention_kernel, FLOAT8, SCALED, 4),
    "attention before a join": (
        attention_kernels.tree_attention_kernel, ATTENTION, CHAINED, 4
    ),
    "join": (attention_join.join_splits_kernel, ATTENTION, CHAINED, 4),
    "tree part, two words": (attention_kernels.tree_part_kernel, ATTENTION, WIDE, 4),
    "tree part, float8": (attention_kernels.tree_part_kernel, FLOAT8, SCALED, 4),
    "KV move": (kv_compaction._compact_kv_kernel, COMPACTION, MOVE | {"NUM_WORDS": 1}, 4),
    "KV move, two words": (
        kv_compaction._compact_kv_kernel, COMPACTION, MOVE | {"NUM_WORDS": 2}, 4
    ),
    "positions and masks, two words": (
        scatter._scatter_tree_kernel, SCATTER,
        {"NUM_ROWS": 128, "NUM_WORDS": 2, "PADDED_ROWS": 128}, 1,
    ),
    "walk": (walk._tree_walk_kernel, WALK, walk_rows(64), 1),
    "walk, two words": (walk._tree_walk_kernel, WALK, walk_rows(128), 1),
    "draft": (
        draft._draft_tree_kernel, DRAFT,
        {"token_map": None, "NUM_HEADS": 5, "NUM_NODES": 63, "NUM_TOP": 10, "GROUP": 128,
         "GROUPS_PER_PROGRAM": 32, "PADDED_NODES": 64, "PADDED_TOP": 16, "PADDED_GROUPS": 256}
        | NO_NOISE, 4,
    ),
    "draft with noise": (
        draft._draft_tree_kernel, DRAFT | NOISE | {"token_map": "*i64"},
        {"NUM_HEADS": 5, "NUM_NODES": 63, "NUM_TOP": 10, "GROUP": 128, "GROUPS_PER_PROGRAM": 32,
         "PADDED_NODES": 64, "PADDED_TOP": 16, "PADDED_GROUPS": 256, "DEPTH_STEP": 1}, 4,
    ),
    "top tokens": (
        draft_tokens._top_tokens_kernel, TOP,
        RANKS | NO_NOISE | {"token_map": None, "columns": None}, 4,
    ),
    "top tokens in columns": (
        draft_tokens._top_tokens_kernel, TOP, RANKS | NO_NOISE | {"weights": None}, 4
    ),
    "top tokens with noise": (
        draft_tokens._top_tokens_kernel, TOP | NOISE,
        RANKS | {"token_map": None, "columns": None, "DEPTH_STEP": 1}, 4,
    ),
    "top tokens in columns with noise": (
        draft_tokens._top_tokens_kernel, TOP | NOISE, RANKS | {"weights": None, "DEPTH_STEP": 0}, 4
    ),
    "paths of sequential heads": (
        sequential._embed_paths_kernel, PATHS, {"SIZE": 4096, "PADDED_SIZE": 4096}, 8
    ),
    "update of sequential heads": (
        sequential._add_update_kernel, UPDATE, {"SIZE": 4096, "BLOCK": 1024}, 4
    ),
    "update without a bias": (
        sequential._add_update_kernel, UPDATE, {"SIZE": 576, "BLOCK": 1024, "bias": None}, 4
    ),
    "float8 product": (float8._float8_product_kernel, PRODUCT, BLOCKS | NO_LAYER, 4),
    "float8 product by warp groups": (
        float8._float8_product_kernel, PRODUCT,
        BLOCKS | NO_LAYER | {"BLOCK_OUTPUTS": 128, "BLOCK_ROWS": 128, "IS_EVEN": False}, 8,
    ),
    "float8 residual layer": (float8._float8_product_kernel, PRODUCT, BLOCKS, 4),
    "chosen tree": (
        tree_choice._best_tree_kernel, CHOICE,
        CHOSEN | dict.fromkeys(("chain_tokens", "chain_matches", "chain_costs")), 8,
    ),
    "chosen tree with chains": (
        tree_choice._best_tree_kernel, CHOICE, CHOSEN | {"LENGTH": 16}, 8
    ),
    "lookup": (
        lookup._lookup_kernel, LOOKUP,
        {"LENGTH": 16, "PADDED_LENGTH": 16, "NUM_PROGRAMS": 8, "MAX_MATCH": 8, "BLOCK": 1024}, 4,
    ),
    "lookup by one program": (
        lookup._lookup_kernel, LOOKUP,
        {"LENGTH": 5, "PADDED_LENGTH": 8, "NUM_PROGRAMS": 1, "MAX_MATCH": 8, "BLOCK": 1024}, 4,
    ),
    "right children": (
        synthetic_kernel._draw_children_kernel, CHILDREN, {"NUM_ROWS": 64, "PADDED_ROWS": 64}, 1
    ),
}  # fmt: skip


def compile_variant(kernel: Any, types: dict[str, str], constants: dict, num_warps: int) -> None:
    """Compile to machine code; integers without a type are int32."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, {})
    triton.compile(source, target=H100, options={"num_warps": num_warps, "num_stages": 2})


def main() -> None:
    results = {}
    for name, variant in VARIANTS.items():
        try:
            compile_variant(*variant)
            results[name] = None
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
