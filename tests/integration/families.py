"""Tiny random models of other architectures, and heads fitted to each by least squares."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tiny import HIDDEN, NUM_HEADS, SIZES, VOCAB

# Of a sliding-window layer: shorter than prompts and outputs, so that windows cut trees.
WINDOW = 24
# Ridge term of the fit, relative to the mean squared hidden value.
RIDGE = 1e-3

DENSE = {**SIZES, "pad_token_id": 0}
# Gemma scales embeddings by sqrt(hidden_size) and shares them with the lm_head.
GEMMA = {**DENSE, "tie_word_embeddings": True, "query_pre_attn_scalar": 32}
# Where the head size is hidden_size / num_attention_heads; vLLM's CPU kernels start at 32.
TWO_HEADS = DENSE | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
MOE = {**DENSE, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ABSOLUTE = {
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# family -> (transformers config class, its arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", DENSE | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", TWO_HEADS),
    "qwen3": ("Qwen3Config", DENSE),
    "gemma": ("GemmaConfig", GEMMA),
    "gemma2": (
        "Gemma2Config",
        GEMMA
        | {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | {"sliding_window": WINDOW, "num_hidden_layers": 3, "sliding_window_pattern": 2},
    ),
    "phi3": ("Phi3Config", DENSE),
    "mixtral": ("MixtralConfig", DENSE | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        MOE
        | {
            "num_experts": 4,
            "shared_expert_intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"num_experts": 4}),
    "gpt_oss": (
        "GptOssConfig",
        MOE | {"num_local_experts": 4, "sliding_window": WINDOW, "intermediate_size": 64},
    ),
    "gpt2": (
        "GPT2Config",
        ABSOLUTE | {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 1024},
    ),
    "opt": (
        "OPTConfig",
        ABSOLUTE
        | {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 1024,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", DENSE | {"num_attention_heads": 2}),
    "olmo2": ("Olmo2Config", TWO_HEADS),
    "granite": ("GraniteConfig", TWO_HEADS),
    "cohere": ("CohereConfig", TWO_HEADS | {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", DENSE | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "stablelm": ("StableLmConfig", TWO_HEADS),
    # Multi-dimensional RoPE: vLLM runs it with mrope_model.py.
    "mrope": ("Qwen2Config", TWO_HEADS),
}
# Factor on random embeddings. Where the lm_head is the same matrix a large one only repeats
# its input.
EMBEDDING_SCALE = {"gemma": 0.3, "gemma2": 0.12, "gemma3": 0.12, "cohere": 0.15}


def make_family(name: str, directory: Path, seed: int = 0) -> Any:
    """Save a float32 model of a family whose greedy output is varied enough to be a test."""
    torch.manual_seed(seed)
    class_name, arguments = CONFIGS[name]
    config = getattr(transformers, class_name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim < 2:
                # Biases and norms start at a constant; a mistake in them would not show.
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight.std() < 0.1:
                weight.copy_(torch.randn_like(weight) * 0.2)
            # Mostly a function of the last token, so that heads can learn it, but not only.
            if re.search(r"(o_proj|out_proj|attn\.dense|attn\.c_proj|attention\.dense)\.w", key):
                weight.mul_(0.3)
            if "embed_tokens" in key:
                weight.mul_(EMBEDDING_SCALE.get(name, 3.0))
    model.save_pretrained(directory)
    if name == "mrope":
        path = directory / "config.json"
        sections = {"rope_parameters": config.rope_parameters | {"mrope_section": [4, 6, 6]}}
        architecture = {"architectures": ["MRoPEQwen2ForCausalLM"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | sections | architecture))
    return model


@torch.no_grad()
def fit_family_heads(model: Any, directory: Path) -> float:
    """Write heads of one layer and own lm_heads; return head 1's accuracy on its own data.

    The layers do nothing (zero weights); the lm_heads are the least-squares map from a hidden
    state to the tokens after the next, on the model's own greedy output.
    """
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB - 8, (64, 8), generator=generator)
    tokens = model.generate(
        prompts, max_new_tokens=56, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    hidden = model.base_model(tokens).last_hidden_state[:, 8:]
    tokens, width = tokens[:, 8:], hidden.shape[-1]
    tensors, accuracy = {}, 0.0
    for k in range(NUM_HEADS):
        states = hidden[:, : -k - 2].flatten(0, 1).double()
        labels = tokens[:, k + 2 :].flatten()
        wanted = torch.nn.functional.one_hot(labels, VOCAB).double()
        ridge = RIDGE * states.square().sum(1).mean() * torch.eye(width, dtype=torch.float64)
        solved = torch.linalg.solve(states.T @ states + ridge, states.T @ wanted)
        if k == 0:
            accuracy = ((states @ solved).argmax(1) == labels).double().mean().item()
        tensors[f"{k}.0.linear.weight"] = torch.zeros(width, width)
        tensors[f"{k}.0.linear.bias"] = torch.zeros(width)
        tensors[f"{k}.1.weight"] = solved.T.float().contiguous()
    write_heads(directory, tensors)
    return accuracy


def random_heads(directory: Path, seed: int = 0, size: int = HIDDEN) -> None:
    """Write heads of one layer that use the base's lm_head and know nothing."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for k in range(NUM_HEADS):
        tensors[f"{k}.0.linear.weight"] = torch.randn(size, size, generator=generator)
        tensors[f"{k}.0.linear.bias"] = torch.randn(size, generator=generator)
    write_heads(directory, tensors)


def write_heads(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A directory as FasterDecoding and TGI publish them."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": NUM_HEADS, "medusa_num_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
