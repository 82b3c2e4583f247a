"""Make a larger Llama that writes the text of a small one, at the larger one's price.

    python benchmarks/widen_model.py --model SMALL --heads HEADS --output DIR --shape 8b

Every matrix of the small model stands in a corner of a larger one; what surrounds it never
reaches the corner.  The residual stream keeps its first dimensions, RMSNorm weights and
epsilon are rescaled for the new width, rotary pairs move to where the larger head has their
frequency, further layers add nothing, and further vocabulary rows score below all others.
Surroundings that cannot matter are filled with random numbers, because a GPU computes faster
on zeros.  In exact arithmetic the logits are equal; in bfloat16 the rescaled weights are
rounded anew.  Medusa heads are widened alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.checkpoint_save import save_heads
from vllm_medusa.head_weights import HeadWeights

# Of the random surroundings: as usual for a model's first weights.
FILL_DEVIATION = 0.02
# The spare dimension that pushes further vocabulary rows down: its weight in the last norm and
# in those rows.  Its share of the norm's mean is half of epsilon's, c^2 = H * eps / 2.
SPARE_NORM, SPARE_ROW = 1024.0, -65536.0
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class WideShape:
    """Sizes of the larger model, named as in a Llama's config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 0  # 0: as before


SHAPES = {
    "7b": WideShape(4096, 32, 32, 32, 128, 11008),  # Llama 2, Vicuna
    "8b": WideShape(4096, 32, 32, 8, 128, 14336, 128256),  # Llama 3
    "13b": WideShape(5120, 40, 40, 40, 128, 13824),
}


class Filler:
    """Random numbers for what cannot matter; one block repeated, because normals are slow.

    Parameters
    ----------
    dtype : torch.dtype
    seed : int or None
        None fills with zeros.
    """

    def __init__(self, dtype: torch.dtype, seed: int | None):
        self.dtype, self.block = dtype, torch.zeros(1, dtype=dtype)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            self.block = torch.randn(1 << 22, generator=generator).mul_(FILL_DEVIATION).to(dtype)

    def __call__(self, *shape: int) -> torch.Tensor:
        """A tensor of this shape."""
        count = math.prod(shape)
        return self.block.repeat(-(-count // len(self.block)))[:count].view(shape).contiguous()


class Widening:
    """Where the parts of a small Llama stand in a larger one.

    Parameters
    ----------
    config : dict
        Of the small model, as in its config.json.
    shape : WideShape
    seed : int or None
        Of the surroundings; None makes them zero.
    dtype : torch.dtype
        Of the tensors made.

    Raises
    ------
    ValueError
        The model is no plain Llama, or a size of the shape is too small.
    """

    def __init__(
        self, config: Mapping[str, Any], shape: WideShape, seed: int | None, dtype: torch.dtype
    ):
        self.config, self.dtype, self.fill = config, dtype, Filler(dtype, seed)
        self.shape = dataclasses.replace(shape, vocab_size=shape.vocab_size or config["vocab_size"])
        self.head_dim = config.get("head_dim") or (
            config["hidden_size"] // config["num_attention_heads"]
        )
        self.group = config["num_attention_heads"] // config["num_key_value_heads"]
        self._check()
        wide_group = shape.num_attention_heads // shape.num_key_value_heads
        # Query heads of one KV head may need several copies of it.
        per_kv = -(-self.group // wide_group)
        self.kv_sources = [h // per_kv for h in range(config["num_key_value_heads"] * per_kv)]
        self.query_places = [
            (kv * per_kv + i // wide_group) * wide_group + i % wide_group
            for kv in range(config["num_key_value_heads"])
            for i in range(self.group)
        ]
        size, wide = config["hidden_size"], self.shape.hidden_size
        # mean(x^2) over the wide stream is this share of the mean over the small one.
        self.share = size / wide
        self.has_spare = self.shape.vocab_size > config["vocab_size"]
        epsilon = config["rms_norm_eps"]
        spare = math.sqrt(size * epsilon / 2) if self.has_spare else 0.0
        self.spare = torch.tensor(spare).to(dtype).item()
        self.epsilon = epsilon * self.share - self.spare**2 / wide
        if len(self.kv_sources) > self.shape.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={shape.num_key_value_heads} of the larger model must be at "
                f"least {len(self.kv_sources)} for groups of {wide_group} query heads"
            )

    def _check(self) -> None:
        config, shape = self.config, self.shape
        if config.get("model_type") != "llama" or config.get("attention_bias"):
            raise ValueError(
                f"model_type={config.get('model_type')!r}: only Llamas without biases are widened"
            )
        small = {field.name: config.get(field.name, 0) for field in dataclasses.fields(shape)}
        small["head_dim"] = self.head_dim
        for name, least in small.items():
            if getattr(shape, name) < least:
                raise ValueError(
                    f"{name}={getattr(shape, name)} of the larger model must be at least {least}"
                )
        if shape.head_dim % self.head_dim:
            raise ValueError(
                f"head_dim={shape.head_dim} must be a multiple of {self.head_dim}: rotary "
                "frequencies have to recur"
            )
        if shape.vocab_size > config["vocab_size"] and shape.hidden_size == config["hidden_size"]:
            raise ValueError("a larger vocabulary needs a spare dimension; raise hidden_size")

    def wide_config(self) -> dict[str, Any]:
        """config.json of the larger model."""
        sizes = dataclasses.asdict(self.shape)
        name = str(self.dtype).removeprefix("torch.")
        tied = {"tie_word_embeddings": False, "rms_norm_eps": self.epsilon, "dtype": name}
        return {**self.config, **sizes, **tied}

    def tensors(self, small: Mapping[str, Any]) -> Iterator[tuple[int, str, torch.Tensor]]:
        """All tensors of the larger model: layer (-1: outside the layers), name, tensor.

        Parameters
        ----------
        small : mapping
            Name -> tensor of the small model.
        """
        wide, size = self.shape.hidden_size, self.config["hidden_size"]
        embedding = small["model.embed_tokens.weight"]
        rows = torch.zeros(self.shape.vocab_size, wide, dtype=self.dtype)
        rows[: len(embedding), :size] = embedding
        head = self.fill(self.shape.vocab_size, wide)
        lm_head = small.get("lm_head.weight", embedding)
        head[: len(lm_head), :size] = lm_head
        norm = self._norm(small["model.norm.weight"])
        if self.has_spare:
            rows[:, size] = self.spare
            head[:, size] = 0.0
            head[len(lm_head) :] = 0.0
            head[len(lm_head) :, size] = SPARE_ROW
            norm[size] = SPARE_NORM
        yield -1, "model.embed_tokens.weight", rows
        yield -1, "lm_head.weight", head
        yield -1, "model.norm.weight", norm
        for layer in range(self.shape.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            is_real = layer < self.config["num_hidden_layers"]
            for name, make in self._layer_makers().items():
                source = small[prefix + name] if is_real else None
                yield layer, prefix + name, make(source)

    def _layer_makers(self) -> dict[str, Any]:
        queries = (self.shape.num_attention_heads, self.query_places, None)
        keys = (self.shape.num_key_value_heads, None, self.kv_sources)
        # sqrt: the larger head divides its scores by a larger root.
        scale = math.sqrt(self.shape.head_dim / self.head_dim)
        return {
            "input_layernorm.weight": self._norm,
            "post_attention_layernorm.weight": self._norm,
            "self_attn.q_proj.weight": lambda w: self._heads(w, *queries, rotary=True, scale=scale),
            "self_attn.k_proj.weight": lambda w: self._heads(w, *keys, rotary=True),
            "self_attn.v_proj.weight": lambda w: self._heads(w, *keys, rotary=False),
            "self_attn.o_proj.weight": self._attention_output,
            "mlp.gate_proj.weight": self._mlp_input,
            "mlp.up_proj.weight": self._mlp_input,
            "mlp.down_proj.weight": self._mlp_output,
        }

    def _norm(self, weight: torch.Tensor | None) -> torch.Tensor:
        # Zero beyond: a spare dimension must not reach the layers.
        out = torch.zeros(self.shape.hidden_size, dtype=self.dtype)
        if weight is not None:
            out[: len(weight)] = weight.float() * math.sqrt(self.share)
        return out

    def _dims(self, rotary: bool) -> torch.Tensor:
        """Small head's dimensions -> the larger one's, at equal rotary frequency."""
        if not rotary:
            return torch.arange(self.head_dim)
        half, step = self.head_dim // 2, self.shape.head_dim // self.head_dim
        first = torch.arange(half) * step
        return torch.cat([first, self.shape.head_dim // 2 + first])

    def _heads(
        self,
        weight: torch.Tensor | None,  # [heads * head_dim, hidden_size]
        num_heads: int,
        places: list[int] | None,
        sources: list[int] | None,
        *,
        rotary: bool,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Projection to heads: head i of the small model goes to ``places[i]``, or head
        ``sources[j]`` to j."""
        out = self.fill(num_heads, self.shape.head_dim, self.shape.hidden_size)
        if weight is None:
            return out.flatten(0, 1)
        small = weight.view(-1, self.head_dim, weight.shape[1]).float() * scale
        small = small if sources is None else small[sources]
        places = torch.arange(len(small)) if places is None else torch.tensor(places)
        # The corner's other dimensions are zero, so that its scores and values stay alone.
        out[places, :, : weight.shape[1]] = 0.0
        out[places[:, None], self._dims(rotary), : weight.shape[1]] = small.to(self.dtype)
        return out.flatten(0, 1)

    def _attention_output(self, weight: torch.Tensor | None) -> torch.Tensor:
        shape = self.shape
        out = torch.zeros(
            shape.hidden_size, shape.num_attention_heads, shape.head_dim, dtype=self.dtype
        )
        if weight is not None:
            small = weight.view(weight.shape[0], -1, self.head_dim)
            out[: len(small), self.query_places, : self.head_dim] = small.to(self.dtype)
        return out.flatten(1)

    def _mlp_input(self, weight: torch.Tensor | None) -> torch.Tensor:
        out = self.fill(self.shape.intermediate_size, self.shape.hidden_size)
        if weight is not None:
            out[: weight.shape[0], : weight.shape[1]] = weight
        return out

    def _mlp_output(self, weight: torch.Tensor | None) -> torch.Tensor:
        out = torch.zeros(
            self.shape.hidden_size, self.shape.intermediate_size, dtype=self.dtype
        )
        if weight is not None:
            out[: weight.shape[0], : weight.shape[1]] = weight
        return out

    def heads(self, small: HeadWeights) -> HeadWeights:
        """Medusa heads with the target's lm_head for the larger model.

        Raises
        ------
        ValueError
            Heads with lm_heads of their own or a vocabulary subset.
        """
        spec = small.spec
        if spec.own_lm_head or spec.vocab_subset_size is not None:
            raise ValueError("only heads that share the model's lm_head are widened")
        size, wide = spec.hidden_size, self.shape.hidden_size
        weight = torch.zeros(*small.weight.shape[:2], wide, wide, dtype=small.weight.dtype)
        weight[..., :size, :size] = small.weight
        path_weight = None
        if small.path_weight is not None:
            path_weight = torch.zeros(
                len(small.path_weight), wide, wide, dtype=small.path_weight.dtype
            )
            # Heads scale embeddings to a mean square of 1, over more dimensions here.
            scaled = small.path_weight.float() * math.sqrt(self.share)
            path_weight[:, :size, :size] = scaled.to(path_weight.dtype)
        bias = None
        if small.bias is not None:
            bias = torch.zeros(*small.bias.shape[:2], wide, dtype=small.bias.dtype)
            bias[..., :size] = small.bias
        spec = dataclasses.replace(spec, hidden_size=wide, vocab_size=self.shape.vocab_size)
        return dataclasses.replace(
            small, spec=spec, weight=weight, bias=bias, path_weight=path_weight
        )


def read_tensors(model: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write_model(widening: Widening, small: Path, output: Path) -> None:
    """One file per layer, an index, config.json and the small model's tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for path in small.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, output / path.name)
    places, total, part, shard = {}, 0, {}, None
    for layer, name, tensor in widening.tensors(read_tensors(small)):
        if part and layer != shard:
            _save_shard(output, shard, part)
            part = {}
        shard, part[name] = layer, tensor
        places[name] = _shard_name(layer)
        total += tensor.numel() * tensor.element_size()
    _save_shard(output, shard, part)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (output / "config.json").write_text(json.dumps(widening.wide_config(), indent=2) + "\n")


def _shard_name(layer: int) -> str:
    return f"model-{layer + 1:05d}.safetensors"


def _save_shard(output: Path, layer: int | None, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, output / _shard_name(layer), metadata={"format": "pt"})


def main() -> None:
    """Widen model and heads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--heads", nargs="+", help="Medusa heads to widen, into OUTPUT/heads, OUTPUT/heads-2, .."
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of what surrounds the small model")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    widening = Widening(config, SHAPES[args.shape], args.seed, getattr(torch, args.dtype))
    write_model(widening, args.model, args.output)
    print(f"wrote {args.output}")
    for place, heads in enumerate(args.heads or []):
        output = args.output / (f"heads-{place + 1}" if place else "heads")
        small = load_heads(heads)
        save_heads(widening.heads(small), output, "M" if small.spec.sequential else "C2")
        if small.tree_path is not None:
            shutil.copy(small.tree_path, output / "tree.json")
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
