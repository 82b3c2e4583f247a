"""Answer masks and per-head label shift."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import extract_hidden_states, label_rows
from vllm_medusa.training.loss import IGNORE

EOS = 99


def test_mask_covers_answer_with_its_end_token_and_nothing_else():
    data = ConversationSet.from_pairs([([10, 11, 12], [20, 21, EOS]), ([13], [22])])
    assert data.answer_mask.tolist() == [False] * 3 + [True] * 3 + [False, True]
    assert data.token_ids[data.answer_mask].tolist() == [20, 21, EOS, 22]
    assert data.num_answer_tokens == 4


def test_head_k_is_asked_for_the_token_k_plus_one_places_on():
    # Token at place t is t itself, so a label reads as the place it came from.
    tokens = np.arange(12)
    mask = tokens >= 4
    positions, labels = label_rows(tokens, mask, num_heads=4)
    assert positions.tolist() == list(range(3, 11))
    for row, t in enumerate(positions):
        for k in range(5):
            expected = t + k + 1 if t + k + 1 <= 11 else IGNORE
            assert labels[row, k] == expected


def test_labels_stop_at_the_end_of_a_turn():
    #         user  answer EOS  user  answer
    tokens = np.array([1, 2, 30, 31, EOS, 3, 4, 40, 41])
    mask = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1], bool)
    positions, labels = label_rows(tokens, mask, num_heads=2)
    assert positions.tolist() == [1, 2, 3, 6, 7]
    assert labels.tolist() == [
        [30, 31, EOS],
        [31, EOS, IGNORE],
        [EOS, IGNORE, IGNORE],
        [40, 41, IGNORE],
        [41, IGNORE, IGNORE],
    ]


@pytest.mark.parametrize("max_batch_tokens", [1, 64], ids=["one-by-one", "padded"])
def test_hidden_states_are_what_the_lm_head_is_fed(tiny_llama, max_batch_tokens):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 50, prompt).tolist(), rng.integers(0, 50, answer).tolist())
        for prompt, answer in [(3, 5), (7, 2), (1, 9)]
    ]
    data = ConversationSet.from_pairs(pairs)
    found = extract_hidden_states(tiny_llama, data, 2, max_batch_tokens)
    assert found.offsets.tolist() == [0, 5, 7, 16]
    for i, (prompt, answer) in enumerate(pairs):
        rows = slice(found.offsets[i], found.offsets[i + 1])
        with torch.no_grad():
            logits = tiny_llama(torch.tensor([prompt + answer])).logits[0]
            applied = tiny_llama.lm_head(found.hidden[rows])
        # Same products in another batch shape: float32 rounding only.
        torch.testing.assert_close(applied, logits[len(prompt) - 1 : -1], atol=1e-5, rtol=1e-5)
        assert found.labels[rows, 0].tolist() == answer


def test_own_greedy_tokens_are_the_lm_heads_labels(tiny_llama):
    prompt = torch.tensor([[5, 6, 7]])
    full = tiny_llama.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    data = ConversationSet.from_pairs([(full[:3], full[3:])])
    found = extract_hidden_states(tiny_llama, data, 1)
    with torch.no_grad():
        assert tiny_llama.lm_head(found.hidden).argmax(1).tolist() == found.labels[:, 0].tolist()


def test_split_keeps_answers_to_one_prompt_together():
    pairs = [([p, p], [a]) for p in range(40) for a in range(3)]
    train, test = ConversationSet.from_pairs(pairs).split(held_out=30, seed=3)
    prompts = [{int(part.tokens(i)[0]) for i in range(len(part))} for part in (train, test)]
    assert not prompts[0] & prompts[1]
    assert len(test) == 30
    assert len(train) == 90


def test_file_round_trip_joins_files(tmp_path):
    first = ConversationSet.from_pairs([([1, 2], [3]), ([4], [5, 6])])
    second = ConversationSet.from_pairs([([7], [8])])
    first.save(tmp_path / "a.safetensors")
    second.save(tmp_path / "b.safetensors")
    joined = ConversationSet.load(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert joined.token_ids.tolist() == list(range(1, 9))
    assert joined.offsets.tolist() == [0, 3, 6, 8]
    assert joined.answer_mask.tolist() == [False, False, True, False, True, True, False, True]


def test_conversation_set_refuses_broken_offsets():
    with pytest.raises(ValueError, match="offsets run from 0 to 3; expected 0 to 2"):
        ConversationSet(np.zeros(2, np.int32), np.zeros(2, bool), np.array([0, 3]))


@pytest.fixture(scope="module")
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
