"""Graphs behind the draw against the same batches taken launch by launch."""

from __future__ import annotations


def differing_logprobs(expected, found) -> list[str]:
    """Names of what two steps' log probabilities differ in."""
    if expected is None or found is None:
        return [] if expected is found else ["logprobs"]
    pairs = {name: (value, getattr(found, name)) for name, value in expected._asdict().items()}
    return [
        name
        for name, (left, right) in pairs.items()
        if not (left.equal(right) if hasattr(left, "equal") else left == right)
    ]


def compare_drawn_steps() -> list[dict]:
    """Draw and walk every batch of the graphs behind the draw launch by launch, too.

    Notes from now on how many requests it had, how many of them had drafts, and what differed.
    """
    from vllm_medusa.drawn_step import DrawnStep

    compared, try_run = [], DrawnStep.try_run

    def comparing(self, hidden_states, input_batch, in_place):
        runner = self.runner
        logits = runner.model.compute_logits(hidden_states[input_batch.logits_indices])
        expected = runner.rejection_sampler(logits, input_batch)
        found = try_run(self, hidden_states, input_batch, in_place)
        if found is not None:
            names = ("sampled_token_ids", "num_sampled", "num_rejected")
            differ = [n for n in names if not getattr(expected, n).equal(getattr(found, n))]
            differ += differing_logprobs(expected.logprobs_tensors, found.logprobs_tensors)
            drafts = input_batch.num_draft_tokens_per_req
            with_drafts = 0 if drafts is None else int((drafts > 0).sum())
            note = {"requests": input_batch.num_reqs, "with drafts": with_drafts}
            compared.append(note | {"in place": in_place, "differ": differ})
        return found

    DrawnStep.try_run = comparing
    return compared
