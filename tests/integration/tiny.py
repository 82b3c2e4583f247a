"""A tiny random Llama and heads fitted to its own output, made in seconds on one core."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, NUM_HEADS = 96, 64, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(directory: Path, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """Save a float32 Llama whose greedy output is varied enough to be a test."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, **overrides})
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        # Mostly a function of the last token, so that heads can learn it, but not only.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
        model.model.embed_tokens.weight.mul_(5.0)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def own_tokens(model: LlamaForCausalLM, count: int, length: int, seed: int) -> torch.Tensor:
    """[count, 8 + length] greedy continuations of random prompts."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, VOCAB, (count, 8), generator=generator)
    return model.generate(
        prompts, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def fit_heads(model: LlamaForCausalLM, directory: Path, steps: int = 120) -> None:
    """Write C1 heads (own lm_heads) that predict the model's own next tokens fairly well.

    Own lm_heads because a tiny random model's lm_head is no basis for other tokens:
    with it heads stay near chance, and a test in which nothing is accepted tests little.
    """
    tokens = own_tokens(model, count=96, length=64, seed=1)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, 8:]
    tokens = tokens[:, 8:]
    heads = [
        torch.nn.ModuleDict(
            {
                "block": torch.nn.Linear(HIDDEN, HIDDEN),
                "lm_head": torch.nn.Linear(HIDDEN, VOCAB, bias=False),
            }
        )
        for _ in range(NUM_HEADS)
    ]
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=1e-2)
    for _ in range(steps):
        loss = 0.0
        for k, head in enumerate(heads, start=1):
            states = hidden[:, : -k - 1]
            logits = head["lm_head"](states + torch.nn.functional.silu(head["block"](states)))
            labels = tokens[:, k + 1 :]
            loss = loss + 0.8**k * torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten()
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for k, head in enumerate(heads):
        tensors[f"{k}.0.linear.weight"] = head["block"].weight.detach().contiguous()
        tensors[f"{k}.0.linear.bias"] = head["block"].bias.detach().contiguous()
        tensors[f"{k}.1.weight"] = head["lm_head"].weight.detach().contiguous()
    save_file(tensors, directory / "medusa_lm_head.safetensors")
    (directory / "config.json").write_text(
        json.dumps(
            {
                "base_model_name_or_path": "model",
                "medusa_num_heads": NUM_HEADS,
                "medusa_num_layers": 1,
            }
        )
    )
