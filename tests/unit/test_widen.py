"""The widened model and heads compute what the small ones compute."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.checkpoint_save import save_heads
from vllm_medusa.head_weights import HeadSpec, HeadWeights
from vllm_medusa.heads import MedusaHeads

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "widen_model.py"))
WideShape, Widening, write_model = TOOL["WideShape"], TOOL["Widening"], TOOL["write_model"]

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Logits of size 10 from float32 sums whose norm weights were scaled by an irrational number.
TOLERANCE = 2e-4

WIDER = {
    "groups of 3 in groups of 4": WideShape(112, 3, 16, 4, 32, 128, 160),
    "groups of 3 without groups": WideShape(66, 2, 6, 6, 16, 80),
    "groups of 3 in groups of 2": WideShape(64, 4, 8, 4, 64, 96, 100),
    "vocabulary alone": WideShape(54, 2, 6, 2, 16, 80, 97),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def small(request, tmp_path_factory):
    """A random Llama and its directory."""
    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp("small")
    config = LlamaConfig(**SMALL, tie_word_embeddings=request.param)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return model, directory


def widen(directory, shape, output, seed=0):
    config = json.loads((directory / "config.json").read_text())
    widening = Widening(config, shape, seed, torch.float32)
    write_model(widening, directory, output)
    return AutoModelForCausalLM.from_pretrained(output).float().eval()


@pytest.mark.parametrize("name", WIDER)
def test_same_logits_and_text(small, tmp_path, name):
    model, directory = small
    wide = widen(directory, WIDER[name], tmp_path)
    ids = torch.randint(3, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = model(ids).logits, wide(ids).logits
        assert (got[..., :VOCAB] - want).abs().max() <= TOLERANCE
        assert (got[..., VOCAB:] < want.min() - 100).all(), "a token that cannot be may win"
        options = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), wide.generate(ids, **options))


def test_surroundings_are_random_and_do_not_matter(small, tmp_path):
    _, directory = small
    shape = WIDER["groups of 3 in groups of 4"]
    one, other = (widen(directory, shape, tmp_path / str(seed), seed) for seed in (0, 1))
    down = one.model.layers[0].mlp.gate_proj.weight
    assert not torch.equal(down, other.model.layers[0].mlp.gate_proj.weight)
    assert (down[80:] != 0).all()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = one(ids).logits[..., :VOCAB] - other(ids).logits[..., :VOCAB]
    assert difference.abs().max() <= TOLERANCE


def test_heads_guess_the_same(small, tmp_path):
    model, directory = small
    shape = WIDER["groups of 3 in groups of 4"]
    wide = widen(directory, shape, tmp_path / "wide")
    spec = HeadSpec(num_heads=2, num_layers=2, hidden_size=48, vocab_size=VOCAB, bias=True,
                    dtype=torch.float32)  # fmt: skip
    heads = HeadWeights(spec, torch.randn(2, 2, 48, 48) * 0.2, bias=torch.randn(2, 2, 48))
    config = json.loads((directory / "config.json").read_text())
    save_heads(Widening(config, shape, 0, torch.float32).heads(heads), tmp_path / "heads")
    found = load_heads(tmp_path / "heads", hidden_size=112, vocab_size=160)

    def logits(model, weights):
        with torch.no_grad():
            hidden = model.model(torch.arange(3, 20)[None]).last_hidden_state[0, -1]
            states = hidden.expand(weights.spec.num_heads, -1)
            for weight, bias in zip(weights.weight, weights.bias, strict=True):
                product = torch.einsum("koi,ki->ko", weight, states) + bias
                states = states + torch.nn.functional.silu(product)
            return model.lm_head(states)

    want, got = logits(model, heads), logits(wide, found)
    assert (got[:, :VOCAB] - want).abs().max() <= TOLERANCE
    assert (got[:, VOCAB:] < want.min() - 100).all()


def test_sequential_heads_guess_the_same(small, tmp_path):
    """Without padded ids, whose spare dimension changes the embeddings' mean square a little."""
    model, directory = small
    shape = dataclasses.replace(WIDER["groups of 3 in groups of 4"], vocab_size=VOCAB)
    wide = widen(directory, shape, tmp_path / "wide")
    spec = HeadSpec(2, 1, 48, vocab_size=VOCAB, dtype=torch.float32, sequential=True)
    heads = MedusaHeads(spec)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = json.loads((directory / "config.json").read_text())
    weights = Widening(config, shape, 0, torch.float32).heads(heads.to_weights())
    path = torch.tensor([[5, 9]])

    def logits(model, heads):
        with torch.no_grad():
            hidden = model.model(torch.arange(3, 20)[None]).last_hidden_state[0, -1:]
            embedded = model.get_input_embeddings()(path)
            return model.lm_head(heads.forward_hidden(hidden, embedded))

    want, got = logits(model, heads), logits(wide, MedusaHeads.from_weights(weights))
    assert (got - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 40}, "hidden_size=40 of the larger model must be at least 48"),
        ({"head_dim": 24}, "head_dim=24 must be a multiple of 16"),
        ({"num_key_value_heads": 1, "num_attention_heads": 6}, "num_key_value_heads=1"),
        ({"hidden_size": 48, "vocab_size": 97}, "raise hidden_size"),
    ],
)
def test_impossible_shapes_are_named(small, change, message):
    _, directory = small
    config = json.loads((directory / "config.json").read_text())
    shape = WideShape(**{**vars(WIDER["groups of 3 without groups"]), **change})
    with pytest.raises(ValueError, match=message):
        Widening(config, shape, None, torch.float32)
