"""The comparison of head variants: answers, quality check, plan, evaluation, tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_base
import torch

from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.training.base_model import embedding_weight, lm_head_weight, run_base
from vllm_medusa.training.calibrate import MISSED, HeadRanks
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import extract_hidden_states
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.tree import TokenTree

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("benchmarks")


def test_answers_of_a_batch_are_each_prompts_likeliest_tokens():
    from greedy_answers import continue_greedily

    model = tiny_base.make_base(seed=3)
    prompts = [[5], [7, 9, 11, 4], [3, 3]]
    ends = [tiny_base.END, 17]
    for prompt, found in zip(prompts, continue_greedily(model, prompts, 12, ends), strict=True):
        expected, ids = [], list(prompt)
        while len(expected) < 12 and not (expected and expected[-1] in ends):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            expected.append(ids[-1])
        assert found == expected


def test_quality_check_is_the_cross_entropy_of_answer_tokens():
    from variant_bases import Base

    model, answers = tiny_base.make_base(), tiny_base.counting_answers(9)
    base = Base("tiny", model, answers, answers, lambda _: None, 64)
    losses = []
    for i in range(len(answers)):
        ids = torch.from_numpy(answers.tokens(i)).long()
        with torch.inference_mode():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        losses += [-log_p[t - 1, ids[t]] for t in np.flatnonzero(answers.mask(i))]
    assert base.nats_per_token() == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_held_out_losses_are_those_of_each_row_alone():
    from types import SimpleNamespace

    from variant_training import held_out_losses

    model, answers = tiny_base.make_base(), tiny_base.counting_answers(9)
    weight, table = lm_head_weight(model), embedding_weight(model)
    spec = HeadSpec(2, 2, tiny_base.HIDDEN, tiny_base.VOCAB, bias=True, sequential=True)
    heads = TrainableHeads(0, 0, 0, spec=spec)
    for parameter in heads.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # One more column of labels than heads, as of all variants together.
    data = extract_hidden_states(model, answers, 3, 64)
    base = SimpleNamespace(lm_head=weight, embeddings=table)
    losses: list[list[float]] = [[], []]
    for i in range(len(answers)):
        ids = torch.from_numpy(answers.tokens(i)).long()
        states = run_base(model, ids[None])[0].detach()
        # Head k reads position t, sees the tokens t+1 .. t+k and is asked for t+k+1; all but the
        # prompt's two tokens are the answer's, its end included.
        for k in (1, 2):
            for t in range(1, len(ids) - k - 1):
                x = states[t]
                for layer in range(2):
                    update = heads.weight[layer, k - 1] @ x + heads.bias[layer, k - 1]
                    for j in range(1, k + 1) if layer == 0 else ():
                        seen = table[ids[t + j]]
                        place = k * (k - 1) // 2 + j - 1
                        update = update + heads.path_weight[place] @ (
                            seen / seen.square().mean().sqrt()
                        )
                    x = x + torch.nn.functional.silu(update)
                losses[k - 1].append(-float((weight @ x).log_softmax(0)[ids[t + k + 1]]))
    expected = [sum(found) / len(found) for found in losses]
    # Seven rows a batch: conversations are cut anywhere, the last batch is shorter.
    assert data.num_rows % 7
    assert held_out_losses(heads, data, base, 7) == pytest.approx(expected, abs=2e-4)


def test_plan_keeps_its_order_and_lengths():
    from variant_plan import CURVE_STEPS, choose

    chosen = choose(["data-all", "medusa-2", "sequential"], ["data-all=11"], 0.5, ("sequential",))
    assert [v.name for v in chosen] == ["medusa-2", "data-all"]
    assert chosen[0].seconds == 50
    assert (chosen[1].seconds, chosen[1].steps) == (11, CURVE_STEPS // 2)
    with pytest.raises(ValueError, match=r"unknown variants \['none'\]"):
        choose(["none"], [], 1.0)


def _ranks(values, log_probs=None):
    ranks = np.array(values, np.int16)
    offsets = np.array([0, len(ranks)], np.int64)
    return HeadRanks(ranks, np.ones_like(ranks, bool), offsets, 8, log_probs)


def _record(tmp_path):
    """Tables of one variant: five tokens; steps accept 2 of 2, then 1 of 1."""
    from variant_eval import AnswerRanks, EvaluationJob, evaluate

    values = [[0, 1], [0, 0], [MISSED, 0], [0, MISSED], [MISSED, MISSED]]
    # All ranks alike: eight nodes are those of depth 1.
    log_probs = np.log(np.full((5, 2, 8), 0.125, np.float32))
    known = _ranks(values, log_probs)
    test = AnswerRanks(_ranks(values), np.array([0]), known)
    trees = evaluate(EvaluationJob(tmp_path, _ranks([[0, 1]] * 3), {"mt_bench": test}))
    variant = {
        "num_heads": 2, "num_layers": 1, "sequential": False, "trees": trees, "steps": 7,
        "seconds": 2.0, "tokens_per_second": 99000, "held_out_losses": [1.5, 2.5], "config": {},
        "history": [[1, 0.1, [3.0, 4.0]]], "training_rows": 2_000_000,
        "nats_above_the_base": 0.01,
    }  # fmt: skip
    return {
        "provenance": {"command": ["head_variants.py"], "gpus": ["a GPU"], "processor": "p"},
        "model": "tiny", "num_questions": 1, "max_tokens": 5, "training_rows": 4_000_000,
        "variants": {"one": variant, "two": {"skipped": "3 s were left, 9 needed"}},
    }  # fmt: skip


def test_evaluation_by_hand_and_its_tables(tmp_path, monkeypatch):
    import report_heads

    record = _record(tmp_path)
    found = record["variants"]["one"]["trees"]["mt_bench"]
    assert TokenTree.load(tmp_path / "tree.json").paths == ((0,), (0, 1))
    # Row 0 accepts two tokens and goes to row 3, which accepts one: 4 tokens in 2 steps.
    assert found["static"]["8"]["tokens_per_step"] == 2.0
    assert found["static"]["8"]["accepted_by_depth"] == [1.0, 0.5]
    # Rows 0, 2 and 3, of which one accepts nothing.
    assert found["dynamic"]["8"]["tokens_per_step"] == 1.3333
    monkeypatch.setattr(report_heads, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["report_tables"], "ROOT", tmp_path)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    text = report_heads.compared_heads_section(path)
    assert "| one | 2 independent, 1 block(s) | one tree | 2.00 | 2.00 | 2.00 | 2.00 |" in text
    assert "one changes the base's cross entropy on held-out answers by +0.0100 nats" in text
    assert "two" not in text
    text = report_heads.training_section(path)
    assert "| 2.0 | 7 | 2 | 99k | - | 3.00 | 1.50 2.50 | 2.00 |" in text
    record["variants"].pop("one")
    path.write_text(json.dumps(record))
    assert report_heads.compared_heads_section(path) == ""
    assert report_heads.training_section(path) == ""


def test_answers_lie_beside_their_questions(tmp_path):
    from greedy_answers import TestAnswers, served_answers

    answers = ConversationSet.from_pairs([([1], [2, 3]), ([4], [5])])
    TestAnswers(answers, np.array([0, 0])).save(tmp_path / "a.safetensors")
    again = served_answers(tmp_path / "a.safetensors", [], {}, 1)
    assert again.questions.tolist() == [0, 0]
    assert again.answers.token_ids.tolist() == [1, 2, 3, 4, 5]
