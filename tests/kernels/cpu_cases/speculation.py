"""Cases of vLLM's own rejection sampler and n-gram speculator."""

import numpy as np
import torch
from vllm.v1.worker.gpu.spec_decode import rejection_sampler, rejection_sampler_utils
from vllm.v1.worker.gpu.spec_decode.ngram import speculator

from cpu_cases.sampling import INT64, VOCAB, normal
from cpu_cases.step import MAX_LEN, MAX_REQS, STEPS, batch, ints, t


def gather(rng):
    """Case of gather_draft_sampled: drafts padded in the prefill become -1."""
    state = batch(rng, [6, 6, 6], [5, 2, 0])
    reqs = torch.repeat_interleave(state["reqs"], torch.tensor([6, 3, 1]))
    places = t([0, 1, 2, 3, 4, 5, 0, 1, 2, 0])
    drafts, pos = rejection_sampler.gather_draft_sampled(
        ints(rng, 0, 1000, 18),
        ints(rng, 0, 40, 18, dtype=torch.int64),
        t(rng.permutation(18)[:10], torch.int64),
        reqs,
        places,
        state["prefill"],
    )
    return {"drafts": drafts, "pos": pos}


def flatten(rng):
    """Case of the kernel that flattens sampled tokens."""
    flat = torch.zeros(10, dtype=torch.int64)
    sampled = ints(rng, 0, 1000, 3, 6, dtype=torch.int64)
    rejection_sampler._flatten_sampled_kernel[(3,)](
        flat, sampled, sampled.stride(0), t([4, 1, 0]), t([0, 6, 9, 10]), num_warps=1
    )
    return {"flat": flat}


def rejection(num_drafts, temperatures, *, good=0.7, placeholders=0.1, use_fp64=False):
    """Case of rejection_sample: each draft is the target's argmax with probability `good`."""

    def case(rng):
        n = len(num_drafts)
        state = batch(rng, [STEPS + 1] * n, num_drafts)
        bounds = state["bounds"]
        total = int(bounds[-1])
        logits = normal(rng, total, VOCAB)
        best = logits.argmax(dim=-1)
        drafts = ints(rng, 0, VOCAB, total)
        drafts[1:] = torch.where(
            torch.as_tensor(rng.random(total - 1) < good), best[:-1].int(), drafts[1:]
        )
        drafts[torch.as_tensor(rng.random(total) < placeholders)] = -1
        lengths = torch.tensor(num_drafts) + 1
        temps = torch.zeros(MAX_REQS)
        temps[state["reqs"]] = t(temperatures, torch.float32)
        # Sharp enough that good drafts are accepted now and then when sampling.
        logits *= 3
        sampled, num_sampled = rejection_sampler_utils.rejection_sample(
            logits,
            None,
            drafts,
            bounds,
            ints(rng, 0, 1 << 20, total, dtype=torch.int64),
            state["reqs"],
            torch.repeat_interleave(state["reqs"], lengths),
            t(np.concatenate([np.arange(length) for length in lengths.tolist()])),
            temps,
            t(rng.integers(INT64.min, INT64.max, MAX_REQS), torch.int64),
            STEPS,
            use_fp64=use_fp64,
        )
        # Columns beyond the count are never written.
        kept = torch.arange(STEPS + 1) < num_sampled[:, None]
        return {"sampled": torch.where(kept, sampled, -1), "num_sampled": num_sampled}

    return case


def ngram(num_tokens, min_n, max_n, num_sampled=1):
    """Case of the n-gram speculator over few token ids, so that suffixes do recur."""

    def case(rng):
        n = len(num_tokens)
        reqs = t(rng.permutation(MAX_REQS)[:n], torch.int64)
        total = torch.zeros(MAX_REQS, dtype=torch.int32)
        total[reqs] = t(num_tokens)
        tokens = ints(rng, 0, 4, MAX_REQS, MAX_LEN)
        sampled = torch.full((n,), num_sampled, dtype=torch.int32)
        block = 16
        num_blocks = MAX_LEN // block
        scratch = torch.zeros(MAX_REQS, num_blocks, dtype=torch.int64)
        drafts = torch.zeros(MAX_REQS, STEPS, dtype=torch.int64)
        speculator._ngram_scan_kernel[(n, num_blocks)](
            tokens, MAX_LEN, reqs, total, sampled, scratch, num_blocks, MAX_LEN, min_n, max_n,
            1 << (max_n - 1).bit_length(), block, num_warps=4, num_stages=2,
        )  # fmt: skip
        speculator._ngram_finalize_kernel[(n,)](
            tokens, MAX_LEN, reqs, total, sampled, ints(rng, 0, 4, MAX_REQS, dtype=torch.int64),
            scratch, num_blocks, drafts, MAX_LEN, num_blocks, STEPS, 8, num_blocks,
            num_warps=2, num_stages=1,
        )  # fmt: skip
        return {"drafts": drafts}

    return case


CASES = {
    "gather drafts": gather,
    "flatten sampled": flatten,
    "rejection: greedy": rejection([5, 3, 0, 1], [0.0] * 4),
    "rejection: greedy, all accepted": rejection([5, 5], [0.0] * 2, good=1.0, placeholders=0.0),
    "rejection: sampled": rejection([5] * 10, [1.0] * 10),
    "rejection: greedy and sampled": rejection([5, 0, 2, 5], [0.0, 1.0, 0.5, 0.0]),
    "rejection: no drafts": rejection([0, 0], [0.0, 1.0]),
    "rejection: placeholders only": rejection([5, 5], [0.0, 1.0], placeholders=1.0),
    "rejection: double precision": rejection([5, 4], [1.0, 1.0], use_fp64=True),
    "ngram: unigrams": ngram([40, 7, 1, 64], 1, 1),
    "ngram: one to three": ngram([40, 7, 3, 64, 2], 1, 3),
    "ngram: two to five": ngram([40, 7, 5, 64], 2, 5),
    "ngram: nothing sampled": ngram([40, 7], 1, 3, num_sampled=0),
}
