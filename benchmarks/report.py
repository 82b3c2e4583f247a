"""Write README's tables from the JSON records in benchmarks/results.

python benchmarks/report.py            # rewrites the marked sections of README.md
python benchmarks/report.py --figures  # and draws the figures anew, which needs matplotlib
python benchmarks/report.py --check    # fails when README or a figure is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

# Also where the folder of this file is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report_comparisons import (
    compare_section,
    latency_section,
    profile_section,
    roofline_section,
    widths_section,
)
from report_coupled import coupled_drafts_section
from report_curve import draw, figure_is_current, learning_curve_section
from report_float8 import float8_heads_section, float8_product_section
from report_heads import (
    compared_heads_section,
    heads_section,
    sequential_draft_section,
    training_section,
    training_speed_section,
)
from report_kernels import (
    counters_section,
    overlaps_section,
    peers_section,
    sanitizer_section,
)
from report_tables import (
    RESULTS,
    ROOT,
    device,
    filters_of,
    load_of,
    measured_table,
    median_of,
    shown_command,
    table,
)
from roofline_figure import draw_roofline, figure_of, roofline_is_current

HEADS = ROOT / "vllm_medusa" / "assets" / "smollm2-135m-instruct"

SYNTHETIC_NOTE = (
    "Drafts are accepted by chance as heads like the paper's Vicuna-7B Medusa-2 would have it "
    "({:g} tokens per step with 63 nodes by `benchmarks/synthetic_profile.py`), as with vLLM's own "
    "synthetic acceptance: heads, trees, sampler and cache run in full, the text means nothing."
)


def serving_section(path: Path) -> str:
    """Plain vLLM against Medusa on MT-Bench, and further sides."""
    record = json.loads(path.read_text())
    rows, notes = [], []
    for result in record["results"]:
        # Older records have one temperature and one set of questions for all results.
        result.setdefault("temperature", record.get("temperature"))
        result.setdefault("num_questions", record.get("num_questions"))
    temperatures = {result["temperature"] for result in record["results"]}
    further = list(record["results"][0].get("further_sides", {}))
    for result in record["results"]:
        if "row_products_tokens_per_s" in result:
            own = result["row_products_tokens_per_s"]["median"]
            notes.append(
                f"Plain vLLM with the row product of this project, {result['concurrency']} "
                f"request(s) at once: {own:.1f} tok/s, "
                f"{own / result['plain_tokens_per_s']['median']:.2f} times stock; Medusa is "
                f"{result['speedup_over_row_products']['median']:.2f} times as fast as that.\n\n"
            )
        acceptance = result["acceptance"]
        plain, medusa = result["plain_tokens_per_s"], result["medusa_tokens_per_s"]
        ratio = result["speedup"]
        rows.append(
            [
                *([f"{result['temperature']:g}"] if len(temperatures) > 1 else []),
                str(result["concurrency"]),
                median_of(plain),
                median_of(medusa),
                f"**{ratio['median']:.2f}** ({ratio['min']:.2f}-{ratio['max']:.2f})",
                f"{acceptance['tokens_per_step']:.2f}",
                " ".join(f"{rate:.2f}" for rate in acceptance["accepted_by_depth"]),
                *(further_side(result["further_sides"][name]) for name in further),
            ]
        )
    header = [
        *(["temperature"] if len(temperatures) > 1 else []),
        "requests at once", "plain tok/s", "Medusa tok/s", "speed-up", "tokens per step",
        "accepted at depth 1, 2, ..", *(f"{name}: speed-up, tokens per step" for name in further),
    ]  # fmt: skip
    at = "" if len(temperatures) > 1 else f", temperature {min(temperatures):g}"
    fewest = min(result["num_questions"] for result in record["results"])
    most = max(result["num_questions"] for result in record["results"])
    count = str(fewest) if fewest == most else f"{fewest} to {most}"
    categories = record["results"][0]["acceptance"]["tokens_per_step_by_category"]
    by_category = ", ".join(f"{name} {value:.2f}" for name, value in categories.items())
    commit = record["provenance"]["git_sha"] or "unknown"
    synthetic = record.get("synthetic_acceptance")
    told = f"Tokens per step by category: {by_category}.{agreement(record)}"
    if synthetic is not None:
        told = SYNTHETIC_NOTE.format(synthetic)
    return (
        f"**{'SYNTHETIC acceptance, ' if synthetic is not None else ''}"
        f"{record.get('label', record['model'])} on {device(record)}**, {count} MT-Bench "
        f"questions, {record['turns']} turn(s), {load_of(record)}, at most {record['max_tokens']} "
        f"tokens{at}{filters_of(record)}, medians of {record['rounds']} interleaved rounds "
        f"(extremes in brackets); commit {commit[:10]}, `{path.relative_to(ROOT)}`:\n\n"
        f"{table(header, rows)}\n\n{''.join(notes)}{told}\n\n`{shown_command(record)}`"
    )


def further_side(result: dict[str, Any]) -> str:
    """Speed-up over plain vLLM and tokens per step of a further side."""
    steps = result["acceptance"]["tokens_per_step"]
    return f"{result['speedup']['median']:.2f}, {steps:.2f}"


def agreement(record: dict[str, Any]) -> str:
    """How greedy answers of both sides agree, and how near a tie they part."""
    found = [r["agreement"] for r in record["results"] if r["agreement"] is not None]
    if not found:
        return ""
    same = ", ".join(f"{f['identical']} of {f['first_turns_compared']}" for f in found)
    text = f" Answers identical to plain vLLM's: {same}"
    if all(f["identical"] == f["first_turns_compared"] for f in found):
        return text + "."
    gap = max(f["largest_gap"] for f in found)
    return (
        f"{text}; where the others part, the two tokens' log probabilities in plain vLLM lie at "
        f"most {gap:.3f} apart."
    )


def serve_section(path: Path) -> str:
    """`vllm serve` with the flag, streamed answers."""
    record = json.loads(path.read_text())
    rates = [a["tokens"] / a["seconds"] for a in record["answers"]]
    return (
        f"**`vllm serve --speculative-model medusa:PATH`** on {device(record)}: "
        f"{len(rates)} streamed answers one after another, {min(rates):.0f} to {max(rates):.0f} "
        f"tok/s, {record['tokens_per_step']:.2f} tokens per step by the server's own metrics; "
        f"`{path.relative_to(ROOT)}`.\n\n`{shown_command(record)}`"
    )


def attention_section(path: Path) -> str:
    """Tree attention and its peers."""
    record = json.loads(path.read_text())
    names = {
        "tree": "tree", "tree-causal": "same kernel, chain mask", "fa3+tree": "FA3 + tree part",
        "triton-qq-bias": "vLLM Triton, bias", "fa3-causal": "FA3, chain",
        "flashinfer": "FlashInfer, custom mask", "xformers": "xformers, pages of 64",
    }  # fmt: skip
    measured = {name for row in record["rows"] for name in row["kernels"]}
    names = {name: title for name, title in names.items() if name in measured}
    rows = []
    for row in record["rows"]:
        shape = row["shape"]
        cells = [
            f"{shape['batch']}", f"{shape['context']}", f"{shape['rows']}",
            f"{shape['heads']}/{shape['kv_heads']} x {shape['head_size']}",
            f"{row['floor_us']:.1f}",
        ]  # fmt: skip
        for name in names:
            found = row["kernels"][name]
            cells.append("failed" if "failed" in found else f"{found['median']:.1f}")
        rows.append(cells)
    header = ["requests", "context", "rows", "heads", "floor", *names.values()]
    text = (
        f"**Tree attention** on {device(record)}, microseconds of one layer (median, cold L2, CUDA "
        "graph replay, which itself takes about 4), bfloat16, pages of 16 tokens; the floor is the "
        "larger of KV bytes at 3.0 TB/s and products at 800 TFLOP/s; FlashAttention 3 cannot take "
        "a tree and runs the rows as a chain;"
    )
    return measured_table(text, path, record, header, rows)


def compaction_section(path: Path) -> str:
    """KV move of all layers."""
    record = json.loads(path.read_text())
    rows = []
    for row in record["rows"]:
        shape, peer = row["shape"], row["torch_indexing"]
        if shape["accepted"]:
            rows.append(
                [
                    f"{shape['batch']}", f"{shape['layers']}",
                    f"{shape['kv_heads']} x {shape['row']}", f"{shape['accepted']}",
                    f"{row['kernel']['median']:.1f}", f"{peer['median']:.1f}",
                ]
            )  # fmt: skip
    header = ["requests", "layers", "KV row", "rows moved", "kernel", "PyTorch indexing"]
    text = (
        f"**KV move after acceptance** on {device(record)}, microseconds for all layers in one "
        "launch (as above);"
    )
    return measured_table(text, path, record, header, rows)


def walk_section(path: Path) -> str:
    """Walk, draft, positions and masks."""
    record = json.loads(path.read_text())
    chosen = all("chosen" in row["kernels"] for row in record["rows"])
    rows = []
    for row in record["rows"]:
        shape, found = row["shape"], row["kernels"]
        names = ("walk", "draft", *(["chosen"] if chosen else []), "scatter", "all")
        cells = [f"{found[name]['median']:.1f}" for name in names]
        rows.append(
            [
                f"{shape['batch']}", f"{shape['heads']} x {shape['vocab']}",
                f"{row['floor_us']:.1f}", *cells, f"{row['torch']['all']['median']:.0f}",
            ]
        )  # fmt: skip
    header = [
        "requests", "heads x vocabulary", "floor", "walk", "draft",
        *(["draft, tree chosen"] if chosen else []), "positions, masks", "all in one graph",
        "PyTorch",
    ]  # fmt: skip
    text = (
        f"**After the draw, 64 rows a request** on {device(record)}, microseconds (as above; the "
        "floor is reading the heads' logits at 3.0 TB/s): walk with request state, top tokens of "
        "all heads into the next tree, positions and masks;"
    )
    return measured_table(text, path, record, header, rows)


def chosen_trees_section(path: Path) -> str:
    """Trees chosen at every step beside the calibrated one, simulated."""
    record = json.loads(path.read_text())
    names = [name for name in record["rows"][0] if name != "nodes"]
    rows = [
        [str(row["nodes"]), *(f"{row[name]['tokens_per_step']:.2f}" for name in names)]
        for row in record["rows"]
    ]
    text = (
        f"**Trees chosen at every step**, {record['model']} with the shipped heads, tokens per "
        f"step on {record['num_questions']} MT-Bench questions ({record['answer_tokens']} tokens "
        f"of greedy answers, {record['dtype']}), simulated exactly, by nodes: the calibrated tree, "
        "and the likeliest paths by the heads' own probabilities;"
    )
    return measured_table(text, path, record, ["nodes", *names], rows)


def cpu_runner_section(path: Path) -> str:
    """V2 runner with the fall-backs against V1 on a CPU."""
    record = json.loads(path.read_text())
    rows = []
    for case in record["cases"]:
        v1, v2 = (case[name]["wall_ms"]["median"] for name in ("v1", "v2"))
        rows.append(
            [str(case["batch"]), case["sampling"], f"{v1:.2f}", f"{v2:.2f}", f"{v2 / v1:.2f}"]
        )
    text = (
        "**V2 runner on a CPU** with the PyTorch fall-backs against vLLM's V1 runner, "
        f"{record['what']}; medians of {record['rounds']} interleaved rounds,"
    )
    header = ["requests", "sampling", "V1", "V2", "V2 / V1"]
    return measured_table(text, path, record, header, rows)


def soak_section(path: Path) -> str:
    """What was left of many mixed requests."""
    record = json.loads(path.read_text())
    counts, metrics, grown = record["counts"], record["metrics"], record["growth_kilobytes"]
    return (
        f"**Soak**, {record['variant']}, on {device(record)}: {record['requests']:,} "
        f"{record['what']}, "
        f"{record['requests_per_s']:.0f} requests and "
        f"{counts['tokens'] / record['seconds']:.0f} tokens a second beside other work; "
        f"{counts['left early']:,} clients left early, "
        f"{metrics['num_preemptions']:,.0f} preemptions, "
        f"{metrics['prefix_cache_hits']:,.0f} prompt tokens from the prefix cache, "
        f"{metrics['spec_decode_num_drafts']:,.0f} trees with "
        f"{metrics['spec_decode_num_accepted_tokens']:,.0f} accepted tokens. Afterwards no block, "
        "slot or request is held; fitted growth of memory over the whole run is "
        f"{grown['engine'] / 1024:.1f} MiB (engine) and {grown['front end'] / 1024:.1f} MiB (front "
        f"end); {record['answers_equal_to_plain_vllm']} of "
        f"{record['answers_equal_to_plain_vllm']} compared answers are plain vLLM's; "
        f"`{path.relative_to(ROOT)}`.\n\n"
        f"`pytest -m long tests/integration/test_soak.py --records {RESULTS.relative_to(ROOT)}`"
    )


def refusals_section() -> str:
    """What is supported, and the refusals of the start-up check."""
    sys.path.insert(0, str(ROOT))
    from vllm_medusa.compatibility import REFUSAL_TEST, REFUSALS, SUPPORTED

    rows = [[s.feature, s.status, f"`{s.test}`"] for s in SUPPORTED]
    rows += [[r.feature, f"refused: {r.reason}", f"`{REFUSAL_TEST}`"] for r in REFUSALS]
    return table(["feature", "status", "tested by"], rows)


def heads_parts() -> list[str]:
    """Tables of trained heads; a record may have none of its kind yet."""
    variants = sorted(RESULTS.glob("*_head_variants*.json"))
    parts = [compared_heads_section(p) for p in [*RESULTS.glob("*_compared_heads.json"), *variants]]
    parts += [float8_heads_section(path) for path in sorted(RESULTS.glob("*_float8_heads.json"))]
    found = sorted(RESULTS.glob("*_coupled_drafts.json"))
    parts += [coupled_drafts_section(path) for path in found]
    parts += [training_section(path) for path in variants] + [learning_curve_section()]
    parts += [training_speed_section(path) for path in sorted(RESULTS.glob("*_training.json"))]
    return [part for part in parts if part]


def results_section() -> str:
    """All measured tables, in a fixed order."""
    parts = [serving_section(path) for path in sorted(RESULTS.glob("*serving*.json"))]
    parts += [compare_section(path) for path in sorted(RESULTS.glob("*_compare.json"))]
    parts += [widths_section(path) for path in sorted(RESULTS.glob("*_widths.json"))]
    parts += [latency_section(path) for path in sorted(RESULTS.glob("*_latency.json"))]
    parts += [roofline_section(path) for path in sorted(RESULTS.glob("*_roofline.json"))]
    parts += [profile_section(path) for path in sorted(RESULTS.glob("*_profile.json"))]
    parts += [serve_section(path) for path in sorted(RESULTS.glob("*_serve.json"))]
    parts.append(heads_section(HEADS))
    parts += heads_parts()
    parts += [chosen_trees_section(path) for path in sorted(RESULTS.glob("*_chosen_trees.json"))]
    parts += [attention_section(path) for path in sorted(RESULTS.glob("*_tree_attention.json"))]
    parts += [peers_section(path) for path in sorted(RESULTS.glob("*_tree_attention_peers.json"))]
    parts += [compaction_section(path) for path in sorted(RESULTS.glob("*_kv_compaction.json"))]
    parts += [overlaps_section(path) for path in sorted(RESULTS.glob("*_kv_overlaps.json"))]
    parts += [walk_section(path) for path in sorted(RESULTS.glob("*_walk.json"))]
    parts += [counters_section(path) for path in sorted(RESULTS.glob("*_kernel_counters.json"))]
    parts += [sanitizer_section(path) for path in sorted(RESULTS.glob("*_sanitizer.json"))]
    found = sorted(RESULTS.glob("*_sequential_draft.json"))
    parts += [sequential_draft_section(path) for path in found]
    found = sorted(RESULTS.glob("*_float8_product.json"))
    parts += [float8_product_section(path) for path in found]
    parts += [cpu_runner_section(path) for path in sorted(RESULTS.glob("cpu_runner.json"))]
    parts += [soak_section(path) for path in sorted(RESULTS.glob("cpu_soak*.json"))]
    return "\n\n".join(part for part in parts if part)


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no section marked <!-- {name} -->")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def main() -> int:
    """Rewrite or check README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--figures", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = fill(fill(old, "refusals", refusals_section()), "results", results_section())
    rooflines = sorted(RESULTS.glob("*_roofline.json"))
    if arguments.check:
        is_current = figure_is_current() and all(map(roofline_is_current, rooflines))
        return int(new != old or not is_current)
    if arguments.figures:
        draw()
        for path in rooflines:
            draw_roofline(json.loads(path.read_text()), figure_of(path))
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
