"""Cases of the kernels that prepare a step and book its results."""

import numpy as np
import torch
from vllm.v1.worker import utils as worker_utils
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
from vllm.v1.worker.gpu.mm import rope
from vllm.v1.worker.gpu.model_states import prompt_embeds as embeds_module

MAX_REQS, MAX_LEN, MAX_TOKENS, NUM_BLOCKS, BLOCK_SIZE = 12, 64, 128, 16, 4
STEPS = 5


def t(values, dtype=torch.int32):
    """Tensor of a list or array."""
    return torch.as_tensor(np.asarray(values), dtype=dtype)


def ints(rng, low, high, *shape, dtype=torch.int32):
    """Random integer tensor."""
    return t(rng.integers(low, high, shape), dtype)


def batch(rng, query_lens, num_drafts=None):
    """State of a batch: requests in random slots with the given query lengths."""
    n = len(query_lens)
    num_drafts = [0] * n if num_drafts is None else num_drafts
    reqs = rng.permutation(MAX_REQS)[:n]
    starts = np.zeros(MAX_REQS + 1, np.int32)
    starts[1 : n + 1] = np.cumsum(query_lens)
    starts[n + 1 :] = starts[n]
    bounds = np.concatenate([[0], np.cumsum(np.array(num_drafts) + 1)])
    return {
        "reqs": t(reqs, torch.int64),
        "starts": t(starts),
        "bounds": t(bounds),
        "computed": ints(rng, 0, 20, MAX_REQS),
        "prefill": ints(rng, 1, 30, MAX_REQS),
        "tokens": ints(rng, 1, 1000, MAX_REQS, MAX_LEN),
    }


def prefill(query_lens, num_lookahead=1, computed=None, prefill=None):
    """Case of prepare_prefill_inputs."""

    def case(rng):
        state = batch(rng, query_lens)
        if computed is not None:
            state["computed"].fill_(computed)
        if prefill is not None:
            state["prefill"].fill_(prefill)
        input_ids = ints(rng, 0, 9, MAX_TOKENS)
        following = ints(rng, 0, 9, num_lookahead, MAX_REQS)
        input_batch.prepare_prefill_inputs(
            input_ids,
            following,
            state["reqs"],
            state["starts"],
            state["tokens"],
            state["prefill"],
            state["computed"],
        )
        return {"input_ids": input_ids, "following": following}

    return case


def positions(query_lens):
    """Case of prepare_pos_seq_lens."""

    def case(rng):
        state = batch(rng, query_lens)
        pos = ints(rng, 0, 9, MAX_TOKENS, dtype=torch.int64)
        seq_lens = ints(rng, 0, 9, MAX_REQS)
        starts = state["starts"][: len(query_lens) + 1]
        input_batch.prepare_pos_seq_lens(state["reqs"], starts, state["computed"], pos, seq_lens)
        return {"pos": pos, "seq_lens": seq_lens}

    return case


def combine(query_lens, num_drafts, num_new=1):
    """Case of combine_sampled_and_draft_tokens."""

    def case(rng):
        state = batch(rng, query_lens, num_drafts)
        bounds = state["bounds"]
        if num_new == 0:
            bounds = t(np.concatenate([[0], np.cumsum(num_drafts)]))
        input_ids = ints(rng, 0, 9, MAX_TOKENS)
        # Around the prefill's end, so that all branches occur.
        seq_lens = state["prefill"][state["reqs"]] + ints(rng, -2, 5, len(query_lens))
        indices = input_batch.combine_sampled_and_draft_tokens(
            input_ids,
            state["reqs"],
            ints(rng, 0, 1000, MAX_REQS, 1, dtype=torch.int64),
            state["starts"],
            seq_lens,
            state["prefill"],
            ints(rng, 0, 1000, MAX_REQS, STEPS, dtype=torch.int64),
            bounds,
            int(bounds[-1]),
            num_new,
        )
        return {"input_ids": input_ids, "indices": indices}

    return case


def expand(num_drafts):
    """Case of expand_idx_mapping."""

    def case(rng):
        state = batch(rng, [STEPS + 1] * len(num_drafts), num_drafts)
        reqs, places = input_batch.expand_idx_mapping(
            state["reqs"], int(state["bounds"][-1]), state["bounds"], STEPS + 1
        )
        return {"reqs": reqs, "places": places}

    return case


def rejected(rng):
    """Case of get_num_sampled_and_rejected, chunked prefills among decodes."""
    drafts = [0, 3, 5, 1, 0, 2]
    state = batch(rng, [6] * 6, drafts)
    seq_lens = state["prefill"][state["reqs"]] + t([-1, 0, 4, 2, -3, 1])
    num_sampled, num_rejected = input_batch.get_num_sampled_and_rejected(
        t([1, 2, 6, 1, 1, 3]), seq_lens, state["bounds"], state["reqs"], state["prefill"]
    )
    return {"num_sampled": num_sampled, "num_rejected": num_rejected}


def post_update(num_sampled, columns, skipped=(), counts=True, query=True):
    """Case of post_update."""

    def case(rng):
        n = len(num_sampled)
        state = batch(rng, rng.integers(1, 7, n))
        reqs = state["reqs"].clone()
        reqs[list(skipped)] = -1
        last = ints(rng, 0, 9, MAX_REQS, 1, dtype=torch.int64)
        total = ints(rng, 1, 30, MAX_REQS)
        bins = ints(rng, 0, 3, MAX_REQS, 8) if counts else None
        # Eight token ids only, so that a request samples the same one twice.
        sampled = ints(rng, 0, 8, n, columns, dtype=torch.int64)
        input_batch.post_update(
            reqs,
            state["computed"],
            last,
            bins,
            sampled,
            t(num_sampled),
            ints(rng, 0, 3, n),
            state["starts"] if query else None,
            state["tokens"],
            total,
        )
        written = {"last": last, "total": total, "tokens": state["tokens"]}
        written["computed"] = state["computed"]
        return written | ({"bins": bins} if counts else {})

    return case


def post_update_computed(rng):
    """Case of post_update_num_computed_tokens."""
    state = batch(rng, [3, 1, 7])
    input_batch.post_update_num_computed_tokens(state["reqs"], state["computed"], state["starts"])
    return {"computed": state["computed"]}


def write_rows(lengths, dtype=torch.int32, one_dim=False):
    """Case of the staged-write kernel on one tensor."""

    def case(rng):
        n = len(lengths)
        shape = (MAX_REQS,) if one_dim else (MAX_REQS, MAX_LEN)
        output = ints(rng, 0, 9, *shape, dtype=dtype)
        starts = [0] * n if one_dim else rng.integers(0, 8, n)
        buffer_utils._apply_write_kernel[(n,)](
            output,
            output.stride(0),
            t(rng.permutation(MAX_REQS)[:n]),
            t(starts),
            ints(rng, 0, 1000, sum(lengths), dtype=dtype),
            t(np.cumsum(lengths)),
            None,
            BLOCK_SIZE=16,
            MULTI_GROUP=False,
        )
        return {"output": output}

    return case


def write_groups(rng):
    """Case of the staged-write kernel on two tensors of different widths."""
    outputs = [ints(rng, 0, 9, MAX_REQS, 32), ints(rng, 0, 9, MAX_REQS, 16)]
    buffer_utils._apply_write_kernel[(3,)](
        torch.tensor([output.data_ptr() for output in outputs], dtype=torch.uint64),
        t([32, 16], torch.int64),
        t([3, 0, 3]),
        t([1, 0, 2]),
        ints(rng, 0, 1000, 9),
        t([4, 5, 9]),
        t([0, 1, 1]),
        BLOCK_SIZE=16,
        MULTI_GROUP=True,
    )
    return {"first": outputs[0], "second": outputs[1]}


def block_tables(rng, groups):
    """Block tables of `groups` KV-cache groups with random content."""
    tables = block_table.BlockTables.__new__(block_table.BlockTables)
    tables.num_kv_cache_groups = groups
    tables.block_sizes = [BLOCK_SIZE, 2 * BLOCK_SIZE][:groups]
    tables._slot_mapping_enabled = [True, groups < 2][:groups]
    tables.device = torch.device("cpu")
    tables.dcp_sharded = torch.ones(groups, dtype=torch.bool)
    tables.cp_rank, tables.cp_size, tables.cp_interleave = 0, 1, 1
    widths = [NUM_BLOCKS, NUM_BLOCKS + 8][:groups]

    class Table:
        def __init__(self, width):
            self.gpu = ints(rng, 0, 100, MAX_REQS, width)

    tables.block_tables = [Table(width) for width in widths]
    tables.input_block_tables = [ints(rng, 0, 9, MAX_REQS, width) for width in widths]
    tables.num_blocks = Table(0)
    tables.num_blocks.gpu = ints(rng, 0, NUM_BLOCKS + 1, groups, MAX_REQS)
    tables.slot_mappings = ints(rng, 0, 9, groups, MAX_TOKENS, dtype=torch.int64)
    tables.init_block_table_layout_tensors()
    return tables


def gather_blocks(groups, num_reqs):
    """Case of the block-table gather."""

    def case(rng):
        tables = block_tables(rng, groups)
        reqs = t(rng.permutation(MAX_REQS)[:num_reqs], torch.int64)
        outputs = tables.gather_block_tables(reqs, num_reqs)
        return {f"group {g}": output.clone() for g, output in enumerate(outputs)}

    return case


def slots(groups, query_lens, dummies=()):
    """Case of the slot mapping."""

    def case(rng):
        tables = block_tables(rng, groups)
        state = batch(rng, query_lens)
        reqs = state["reqs"].clone()
        reqs[list(dummies)] = -1
        pos = ints(rng, 0, MAX_LEN, MAX_TOKENS, dtype=torch.int64)
        output = tables.compute_slot_mappings(reqs, state["starts"], pos, MAX_TOKENS)
        return {"slots": output.clone()}

    return case


def rope_positions(query_lens):
    """Case of multi-dimensional RoPE positions."""

    def case(rng):
        state = batch(rng, query_lens)
        written = ints(rng, 0, 9, 3, MAX_TOKENS + 1, dtype=torch.int64)
        rope._prepare_rope_positions_kernel[(len(query_lens),)](
            written,
            written.stride(0),
            ints(rng, 0, 100, MAX_REQS * 3, MAX_LEN),
            3 * MAX_LEN,
            MAX_LEN,
            ints(rng, -5, 5, MAX_REQS),
            state["reqs"],
            state["starts"],
            state["prefill"],
            state["computed"],
            BLOCK_SIZE=16,
            NUM_DIMS=3,
        )
        return {"positions": written}

    return case


def prompt_embeds(query_lens, embeds_len, dtype, masked):
    """Case of prompt embeddings over token embeddings, of every second request or all."""

    def case(rng):
        state = batch(rng, query_lens)
        hidden_size = 40
        written = ints(rng, 0, 9, MAX_TOKENS, hidden_size, dtype=dtype)
        given = ints(rng, 10, 99, MAX_REQS, embeds_len, hidden_size, dtype=dtype)
        masks = ints(rng, 0, 2, MAX_REQS, embeds_len, dtype=torch.uint8)
        lengths = t(np.where(np.arange(MAX_REQS) % 2 == 0, embeds_len, 0 if masked else 3))

        def addresses(tensor):
            return torch.tensor([row.data_ptr() for row in tensor], dtype=torch.uint64)

        tokens_per_program = embeds_module.TOKEN_BLOCK
        programs = -(-max(query_lens) // tokens_per_program)
        embeds_module._apply_prompt_embeds_kernel[(len(query_lens), programs)](
            written,
            written.stride(0),
            addresses(given),
            addresses(masks) if masked else torch.zeros(MAX_REQS, dtype=torch.uint64),
            lengths,
            state["reqs"],
            state["starts"],
            state["computed"],
            hidden_size,
            TOKEN_BLOCK=tokens_per_program,
            BLOCK_SIZE=16,
        )
        return {"inputs_embeds": written}

    return case


def zero_blocks(rng):
    """Case of KV-block zeroing: two segments of different strides."""
    segments = [ints(rng, 1, 9, 8, 16), ints(rng, 1, 9, 8, 32)]
    worker_utils._zero_kv_blocks_kernel[(2, 2, 2)](
        torch.tensor([segment.data_ptr() for segment in segments], dtype=torch.uint64),
        t([16, 32], torch.int64),
        t([12, 20], torch.int64),
        t([6, 1], torch.int64),
        BLOCK_SIZE=16,
    )
    return {"first": segments[0], "second": segments[1]}


CASES = {
    "prefill inputs: one request": prefill([6], computed=0, prefill=9),
    "prefill inputs: prefills among decodes": prefill([6, 1, 3, 1, 9, 2]),
    "prefill inputs: lookahead runs past the prompt": prefill([3, 4], 4, computed=2, prefill=7),
    "prefill inputs: nothing to prefill": prefill([1, 1], computed=9, prefill=9),
    "positions: one decode": positions([1]),
    "positions: decodes only": positions([1] * 7),
    "positions: mixed lengths": positions([1, 9, 3, 1]),
    "positions: an empty query": positions([2, 0, 1]),
    "positions: batch full": positions([2] * MAX_REQS),
    "combine: no drafts": combine([1, 4, 1, 7], [0, 0, 0, 0]),
    "combine: drafts": combine([6, 3, 1, 4], [5, 2, 0, 3]),
    "combine: as many logits as requests, unevenly": combine([3, 3], [2, 0], num_new=0),
    "combine: no new tokens": combine([5, 5, 5], [5, 3, 4], num_new=0),
    "expand: uneven": expand([0, 5, 2]),
    "expand: one row": expand([0]),
    "rejected": rejected,
    "post update: one token each": post_update([1] * 5, 1),
    "post update: prefill chunks sample nothing": post_update([0, 1, 0], 1),
    "post update: several tokens, repeated ones": post_update([6, 1, 0, 4], 6),
    "post update: skipped rows, no query": post_update([2, 1, 3], 6, skipped=[1], query=False),
    "post update: all rows skipped": post_update([2, 1], 6, skipped=[0, 1]),
    "post update: no counts": post_update([2, 1], 6, counts=False),
    "post update: computed only": post_update_computed,
    "staged writes: rows, one longer than a block": write_rows([5, 1, 30, 2]),
    "staged writes: one element each": write_rows([1] * 6, one_dim=True),
    "staged writes: float": write_rows([3, 2], dtype=torch.float32),
    "staged writes: two groups": write_groups,
    "block tables: one group": gather_blocks(1, 5),
    "block tables: two groups, batch full": gather_blocks(2, MAX_REQS),
    "slots: decodes": slots(1, [1] * 6),
    "slots: mixed lengths": slots(1, [5, 1, 12]),
    "slots: two groups, one without mapping": slots(2, [5, 1, 12]),
    "slots: a dummy request": slots(1, [2, 3, 1], dummies=[1]),
    "rope positions": rope_positions([6, 1, 3, 1, 9, 2]),
    "prompt embeddings": prompt_embeds([6, 1, 20, 1, 9, 2], 30, torch.float32, False),
    "prompt embeddings: token ids among them": prompt_embeds([6, 1, 20], 25, torch.float32, True),
    "prompt embeddings: bfloat16": prompt_embeds([4, 18], 30, torch.bfloat16, True),
    "zero KV blocks": zero_blocks,
}
