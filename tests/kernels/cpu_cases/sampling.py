"""Cases of the sampling kernels."""

import numpy as np
import torch
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.sample import (
    bad_words,
    gumbel,
    logit_bias,
    logprob,
    min_p,
    output,
    penalties,
    prompt_logprob,
    thinking_budget,
    trace_replay,
)

from cpu_cases.step import MAX_LEN, MAX_REQS, batch, ints, t

VOCAB = 2100  # Not a multiple of any block size, and more than two blocks of 1024.
INT64 = np.iinfo(np.int64)


def normal(rng, *shape, scale=3.0, dtype=torch.float32):
    """Random logits."""
    return torch.as_tensor(rng.normal(0, scale, shape), dtype=torch.float32).to(dtype)


def rows_of(rng, lengths):
    """Expanded mapping and places of requests with the given number of rows."""
    reqs = np.repeat(rng.permutation(MAX_REQS)[: len(lengths)], lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    return t(reqs, torch.int64), t(places)


def gumbel_sample(temperatures, *, scale=3.0, dtype=torch.float32, masked=False, padding=False,
                  cache=False, columns=None, **options):  # fmt: skip
    """Case of gumbel_sample with a request a row."""
    options = {"apply_temperature": False, "is_drafting": False} | options

    def case(rng):
        n = len(temperatures)
        logits = normal(rng, n, VOCAB, scale=scale, dtype=dtype)
        if masked:
            logits[torch.as_tensor(rng.random((n, VOCAB)) < 0.99)] = float("-inf")
        reqs = t(rng.permutation(MAX_REQS)[:n], torch.int64)
        temps = torch.zeros(MAX_REQS)
        temps[reqs] = t(temperatures, torch.float32)
        if padding:
            reqs[-1] = -1
        seeds = t(rng.integers(INT64.min, INT64.max, MAX_REQS), torch.int64)
        pos = ints(rng, 0, 1 << 20, n, dtype=torch.int64)
        kept = {}
        if cache:
            kept = {"logits_cache": torch.zeros(MAX_REQS, 3, VOCAB, dtype=dtype)}
            kept["logits_cache_col"] = columns
        sampled = gumbel.gumbel_sample(logits, reqs, temps, seeds, pos, **options, **kept)
        return {"sampled": sampled} | ({"cache": kept["logits_cache"]} if cache else {})

    return case


def temperature(dtype):
    """Case of apply_temperature; 0 and 1 leave a row alone."""

    def case(rng):
        reqs, _ = rows_of(rng, [2, 1, 3, 1])
        temps = torch.ones(MAX_REQS)
        temps[reqs.unique()[:3]] = torch.tensor([0.0, 0.7, 1.9])
        logits = normal(rng, 7, VOCAB, dtype=dtype)
        gumbel.apply_temperature(logits, reqs, temps)
        return {"logits": logits}

    return case


def min_p_case(rng):
    """Case of apply_min_p, one request without."""
    reqs, _ = rows_of(rng, [1, 2, 1])
    values = t(rng.uniform(0.01, 0.5, MAX_REQS), torch.float32)
    values[reqs[0]] = 0.0
    logits = normal(rng, 4, VOCAB)
    min_p.apply_min_p(logits, reqs, values)
    return {"logits": logits}


def penalties_case(lengths, dtype=torch.float32, unused=0):
    """Case of apply_penalties; the first `unused` requests have none."""

    def case(rng):
        reqs, places = rows_of(rng, lengths)
        repetition = t(rng.uniform(0.5, 2, MAX_REQS), torch.float32)
        frequency = t(rng.uniform(-1, 1, MAX_REQS), torch.float32)
        presence = t(rng.uniform(-1, 1, MAX_REQS), torch.float32)
        for req in reqs.unique()[:unused]:
            repetition[req], frequency[req], presence[req] = 1.0, 0.0, 0.0
        words = -(-VOCAB // 32)
        logits = normal(rng, sum(lengths), VOCAB, dtype=dtype)
        penalties.apply_penalties(
            logits,
            reqs,
            # Few distinct drafts, so that one repeats within a request.
            ints(rng, 0, 3, sum(lengths)),
            places,
            repetition,
            frequency,
            presence,
            ints(rng, -(2**31), 2**31, MAX_REQS, words),
            ints(rng, 0, 3, MAX_REQS, VOCAB),
        )
        return {"logits": logits}

    return case


def bincount(rng):
    """Case of bincount: no output, some output, no prompt beyond one token."""
    reqs = t(rng.permutation(MAX_REQS)[:3], torch.int64)
    prompt, prefill = ints(rng, 1, 9, MAX_REQS), ints(rng, 30, 40, MAX_REQS)
    prefill[reqs[0]] = prompt[reqs[0]]
    mask = ints(rng, -(2**31), 2**31, MAX_REQS, -(-VOCAB // 32))
    counts = ints(rng, 0, 3, MAX_REQS, VOCAB)
    tokens = ints(rng, 0, 40, MAX_REQS, MAX_LEN)
    penalties.bincount(reqs, tokens, prompt, prefill, mask, counts, 40)
    return {"mask": mask, "counts": counts}


def bad_words_case(lengths, num_words):
    """Case of apply_bad_words over three token ids, so that prefixes do match."""

    def case(rng):
        reqs, places = rows_of(rng, lengths)
        counts = torch.zeros(MAX_REQS, dtype=torch.int32)
        counts[reqs.unique()] = t(num_words)
        offsets = np.zeros((MAX_REQS, 6), np.int64)
        offsets[:, 1:] = np.cumsum(rng.integers(1, 4, (MAX_REQS, 5)), axis=1)
        prompt = ints(rng, 1, 20, MAX_REQS)
        logits = normal(rng, sum(lengths), VOCAB)
        bad_words.apply_bad_words(
            logits,
            reqs,
            ints(rng, 0, 3, MAX_REQS, 20),
            t(offsets),
            counts,
            ints(rng, 0, 3, MAX_REQS, MAX_LEN),
            prompt,
            # Zero to three output tokens: some prefixes do not fit.
            prompt + ints(rng, 0, 4, MAX_REQS),
            ints(rng, 0, 3, sum(lengths)),
            places,
            max(num_words),
        )
        return {"logits": logits}

    return case


def bias(check_all_masked):
    """Case of apply_logit_bias: every feature on some request, all on one."""

    def case(rng):
        reqs, _ = rows_of(rng, [1, 2, 1, 1, 2])
        ids = reqs.unique()
        num_allowed, num_bias, num_stop = torch.zeros(3, MAX_REQS, dtype=torch.int32)
        num_allowed[ids[[0, 4]]] = t([7, 2])
        num_bias[ids[[1, 4]]] = t([5, 3])
        num_stop[ids[[2, 3, 4]]] = t([4, 2, 2])
        stop = t(np.array([rng.permutation(VOCAB)[:8] for _ in range(MAX_REQS)]))
        allowed = t(np.array([rng.permutation(VOCAB)[:8] for _ in range(MAX_REQS)]))
        # The last request may only say stop tokens, which come back when restorable.
        allowed[ids[4], :2] = stop[ids[4], :2]
        logits = normal(rng, 7, VOCAB)
        logit_bias.apply_logit_bias(
            logits,
            reqs,
            ints(rng, 0, 20, 7, dtype=torch.int64),
            num_allowed,
            allowed,
            num_bias,
            t(np.array([rng.permutation(VOCAB)[:8] for _ in range(MAX_REQS)])),
            normal(rng, MAX_REQS, 8),
            t([30] * MAX_REQS),
            num_stop,
            torch.ones(MAX_REQS, dtype=torch.bool),
            stop,
            check_all_masked,
        )
        return {"logits": logits}

    return case


def logprobs(num_logprobs, custom=False, dtype=torch.float32):
    """Case of compute_topk_scores."""

    def case(rng):
        logits = normal(rng, 5, VOCAB, dtype=dtype)
        logits[0, :3] = logits[0].max()  # ties
        sampled = ints(rng, 0, VOCAB, 5, dtype=torch.int64)
        options = {}
        if custom:
            state = logprob.LogprobTokenIdsState.__new__(logprob.LogprobTokenIdsState)

            class Column:
                def __init__(self, gpu):
                    self.gpu = gpu

            reqs, _ = rows_of(rng, [1, 2, 2])
            counts = torch.zeros(MAX_REQS, dtype=torch.int32)
            counts[reqs.unique()[:2]] = t([4, 1])
            state.num_token_ids = Column(counts)
            state.token_ids = Column(ints(rng, 0, VOCAB, MAX_REQS, 8))
            options = {
                "logprob_token_ids_state": state,
                "expanded_idx_mapping": reqs,
                "max_per_req_token_ids": 4,
            }
        result = logprob.compute_topk_scores(logits, num_logprobs, sampled, **options)
        written = {"ids": result.logprob_token_ids, "logprobs": result.logprobs}
        if dtype == torch.float32:
            # The interpreter compares bfloat16 numbers as the integers of their bits.
            written["ranks"] = result.selected_token_ranks
        return written

    return case


def prompt_logprob_ids(rng):
    """Case of get_prompt_logprobs_token_ids."""
    state = batch(rng, [6, 1, 9])
    written = prompt_logprob.get_prompt_logprobs_token_ids(
        16, state["starts"], state["reqs"], state["computed"], state["tokens"]
    )
    return {"token_ids": written}


def grammar(rng):
    """Case of the grammar bitmask: rows of two requests, one place without logits."""
    logits = normal(rng, 7, VOCAB)
    mask = ints(rng, -(2**31), 2**31, 4, -(-VOCAB // 32))
    stride = 4
    structured_outputs._apply_grammar_bitmask_kernel[(4, 1)](
        logits,
        logits.stride(0),
        t([1 * stride, 1 * stride + 1, 2 * stride, 2 * stride + 3]),
        t([0, 1, 4, 7]),
        mask,
        mask.stride(0),
        VOCAB,
        MASK_STRIDE=stride,
        BLOCK_SIZE=4096,
    )
    return {"logits": logits}


def sampling_mask(rows_per_request, max_num_kept):
    """Case of SamplingMaskTensors.from_logits."""

    def case(rng):
        logits = normal(rng, 3 * rows_per_request, VOCAB)
        logits[torch.as_tensor(rng.random(logits.shape) < 0.99)] = float("-inf")
        result = output.SamplingMaskTensors.from_logits(
            logits,
            t(np.arange(4) * rows_per_request),
            t([1, rows_per_request, 0]),
            max_num_kept,
            rows_per_request,
        )
        # Ids beyond the count, and masks of unused rows, are never written.
        width = result.token_ids.shape[1]
        valid = torch.arange(width) < result.counts[:, None]
        used = result.counts > 0
        return {
            "token_ids": torch.where(valid, result.token_ids, -1),
            "mask": torch.where(used[:, None], result.packed_mask, 0),
            "counts": result.counts,
        }

    return case


def budget(lengths, markers, cold):
    """Case of apply_thinking_budget over three token ids, so that markers do match."""

    def case(rng):
        reqs, places = rows_of(rng, lengths)
        logits = normal(rng, sum(lengths), VOCAB)
        budgets = ints(rng, -1, 4, MAX_REQS)
        low, high = (-1, 0) if cold else (-1, 8)
        starts, ends = ints(rng, low, high, 2, MAX_REQS).unbind()
        starts, ends = starts.contiguous(), ends.contiguous()
        scans = torch.zeros(MAX_REQS, dtype=torch.int32) if cold else ints(rng, 0, 14, MAX_REQS)
        thinking_budget.apply_thinking_budget(
            logits,
            reqs.unique(),
            reqs,
            budgets,
            ints(rng, 0, 3, MAX_REQS, MAX_LEN),
            ints(rng, 1, 14, MAX_REQS),
            ints(rng, 0, 3, sum(lengths)),
            places,
            starts,
            ends,
            scans,
            *(t(marker) for marker in markers),
        )
        return {"logits": logits, "starts": starts, "ends": ends, "scans": scans}

    return case


def trace(rng):
    """Case of apply_trace_tokens: in the trace, past it, before it, none, padding."""
    sampled = ints(rng, 0, 9, 5, dtype=torch.int64)
    total = t([7, 30, 4, 7, 7] + [0] * 7)
    trace_replay.apply_trace_tokens(
        sampled,
        t([0, 1, 2, 3, -1], torch.int64),
        ints(rng, 100, 200, MAX_REQS, MAX_LEN),
        t([5, 5, 5, 0, 5] + [0] * 7),
        total,
        t([5, 5, 5, 5, 5] + [0] * 7),
    )
    return {"sampled": sampled}


COLUMN = torch.tensor(2)
CASES = {
    "gumbel: greedy": gumbel_sample([0.0] * 4),
    "gumbel: sampled": gumbel_sample([1.0] * MAX_REQS),
    "gumbel: greedy and sampled": gumbel_sample([0.0, 1.0, 0.0, 0.6]),
    "gumbel: temperature applied": gumbel_sample([0.3, 1.7, 0.0, 1.0], apply_temperature=True),
    "gumbel: drafting": gumbel_sample([1.0] * 8, is_drafting=True),
    "gumbel: double precision": gumbel_sample([1.0, 0.0, 0.5, 1.0], use_fp64=True),
    "gumbel: double precision, few tokens": gumbel_sample([1.0] * 4, masked=True, use_fp64=True),
    "gumbel: few tokens left": gumbel_sample([1.0] * 10, masked=True),
    "gumbel: wide logits, most cannot win": gumbel_sample([1.0] * 10, scale=30.0),
    "gumbel: flat logits": gumbel_sample([1.0] * 10, scale=0.0),
    "gumbel: half precision": gumbel_sample([1.0, 0.0, 0.8], dtype=torch.bfloat16),
    "gumbel: padding row": gumbel_sample([1.0, 0.7, 0.9], padding=True),
    "gumbel: logits kept": gumbel_sample([1.0, 0.5, 0.9], cache=True, columns=COLUMN),
    "gumbel: logits kept, column a row": gumbel_sample(
        [1.0, 0.5, 0.9], cache=True, columns=torch.tensor([0, 2, 1])
    ),
    "temperature: float32": temperature(torch.float32),
    "temperature: bfloat16": temperature(torch.bfloat16),
    "min p": min_p_case,
    "penalties: one row each": penalties_case([1, 1, 1]),
    "penalties: drafts counted": penalties_case([4, 1, 6]),
    "penalties: some requests without": penalties_case([2, 1, 3], unused=2),
    "penalties: no request with": penalties_case([1, 1], unused=2),
    "penalties: bfloat16": penalties_case([2, 2], dtype=torch.bfloat16),
    "penalties: bincount": bincount,
    "bad words: one row each": bad_words_case([1] * 6, [0, 5, 3, 5, 1, 4]),
    "bad words: drafts": bad_words_case([4, 1, 6], [5, 2, 5]),
    "logit bias": bias(False),
    "logit bias: restore a masked row": bias(True),
    "logprobs: sampled only": logprobs(0),
    "logprobs: top 5": logprobs(5),
    "logprobs: all tokens": logprobs(VOCAB),
    "logprobs: bfloat16": logprobs(3, dtype=torch.bfloat16),
    "logprobs: own token lists": logprobs(2, custom=True),
    "logprobs: own token lists, no top": logprobs(0, custom=True),
    "prompt logprobs: ids": prompt_logprob_ids,
    "grammar": grammar,
    "sampling mask: one row a request": sampling_mask(1, 64),
    "sampling mask: more kept than fits": sampling_mask(4, 5),
    "thinking budget: single-token markers, cold": budget([1] * 8, [[0], [1], [2]], True),
    "thinking budget: long markers, cold": budget([1] * 8, [[0, 1], [1, 0], [2, 1, 2]], True),
    "thinking budget: drafts, warm": budget([3, 1, 5, 2], [[0, 1], [1], [2, 2]], False),
    "trace replay": trace,
}
