"""Loads the base model for training and calibration, optionally quantised."""

from pathlib import Path
from typing import Any, Literal

import torch

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.head_weights import HeadWeights

Quantisation = Literal["none", "8bit", "4bit"]
DTYPES = ("auto", "bfloat16", "float16", "float32")


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(
    model: str, dtype: str = "bfloat16", device: str | None = None, quantise: Quantisation = "none"
) -> Any:
    """A transformers causal language model in evaluation mode.

    Parameters
    ----------
    model : str
        Folder or hub id.
    dtype : str
        One of ``DTYPES``; ``auto`` takes the checkpoint's.
    device : str, optional
        ``default_device()`` when not given.
    quantise : {"none", "8bit", "4bit"}
        Weights of the layers through bitsandbytes; the lm_head, which the heads share, stays
        as it is. Heads are then trained on what the quantised model would feed them.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    device = device or default_device()
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if quantise == "none":
        return AutoModelForCausalLM.from_pretrained(model, dtype=kind).to(device).eval()
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=kind, device_map={"": device},
        quantization_config=_quantisation_config(quantise, kind),
    )  # fmt: skip
    return loaded.eval()


def _quantisation_config(quantise: str, dtype: Any) -> Any:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantise is {quantise!r}, which needs bitsandbytes; pip install bitsandbytes, or "
            "use quantise none"
        )
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def load_heads_for(model: Any, path: str | Path) -> HeadWeights:
    """Heads of a checkpoint that fit ``model``, in its dtype."""
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    return load_heads(path, vocab_size=vocab_size, hidden_size=hidden_size, dtype=model.dtype)


def compile_layers(model: Any, dynamic: bool | None = True) -> Any:
    """Compile every decoder layer of a transformers model in place, and return the model.

    Norms, rotations and activations become a few kernels; without that they take longer than the
    products of a narrow model. All layers share one compiled graph; :func:`run_base` goes on
    without it where compiling fails.

    Parameters
    ----------
    model
        A transformers model whose weights are not trained.
    dynamic : bool, optional
        True: one graph for any batch and length, where every batch has a shape of its own.
        None: the first shape gets a graph of its own, which compiles faster and is all that is
        needed where no other shape comes; any other makes one for all shapes.
    """
    layers = _named_layers(model)
    if not layers:
        raise ValueError(
            f"compile_base: {type(model).__name__} does not name the class of its layers; use "
            "compile_base false"
        )
    for layer in layers:
        layer.compile(dynamic=dynamic)
    return model


def has_compiled_layers(model: Any) -> bool:
    """Whether :func:`compile_layers` was called and compiling has not failed since."""
    return any(layer._compiled_call_impl is not None for layer in _named_layers(model))


def _named_layers(model: Any) -> list[Any]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def run_base(
    model: Any,
    # [conversations, length] int64
    input_ids: torch.Tensor,
) -> torch.Tensor:
    """[conversations, length, hidden] that the lm_head is fed; the lm_head itself is not run.

    Padding is on the right and attention causal, so no mask is needed: real tokens never see the
    padding, and its outputs are not to be read.
    """

    def run() -> torch.Tensor:
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    try:
        return run()
    except RuntimeError as error:
        # Here, since its import takes seconds.
        from torch._dynamo.exc import TorchDynamoException

        if not (isinstance(error, TorchDynamoException) and has_compiled_layers(model)):
            raise
        # "backend='inductor' raised:", then the error and much advice.
        reason = " ".join(str(error).split("\n")[:2])
        print(f"compile_base: going on without, since compiling failed: {reason}", flush=True)
        for layer in _named_layers(model):
            # There is no public opposite of Module.compile.
            layer._compiled_call_impl = None
        return run()


def lm_head_weight(model: Any) -> torch.Tensor:
    """[vocab, hidden] of the output layer, detached; a bias there is refused."""
    layer = model.get_output_embeddings()
    if getattr(layer, "bias", None) is not None:
        raise ValueError(
            f"the lm_head of {type(model).__name__} has a bias; expected none, since heads apply "
            "its weight alone. Train heads with an output matrix of their own"
        )
    return layer.weight.detach()


def embedding_weight(model: Any) -> torch.Tensor:
    """[vocab, hidden] of the input embeddings, detached."""
    return model.get_input_embeddings().weight.detach()
