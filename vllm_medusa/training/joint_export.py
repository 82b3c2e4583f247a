"""Writes what joint training made: heads, the adapter, and a base model to serve them on."""

from pathlib import Path
from typing import Any

from vllm_medusa.training.export import export_heads
from vllm_medusa.training.joint_model import JointModel

ADAPTER_FOLDER = "adapter"


def export_joint(model: JointModel, directory: str | Path, base_name: str, source: str) -> Any:
    """Export and return the base model, in evaluation mode and with its adapter merged.

    ``directory`` gets the heads; ``directory/adapter`` the LoRA weights; and
    ``directory/<base_name>-medusa2`` the whole tuned base with its tokenizer, the model that the
    heads fit. A quantised base cannot be merged: the adapter is to be merged into the whole one.

    Parameters
    ----------
    model : JointModel
    directory : path
    base_name : str
        Name of the untuned base.
    source : str
        Folder or hub id that the tokenizer is copied from.
    """
    directory, config = Path(directory), model.config
    base = model.base.eval()
    vocab_size = base.get_output_embeddings().weight.shape[0]
    if config.joint_epochs == 0:
        export_heads(model.heads, directory, vocab_size, base_name)
        return base
    tuned_name = f"{base_name}-medusa2"
    export_heads(model.heads, directory, vocab_size, tuned_name)
    if model.adapter is not None:
        adapter = model.adapter[0]
        adapter.save_pretrained(str(directory / ADAPTER_FOLDER))
        if config.quantise != "none":
            return base
        base = adapter.merge_and_unload()
    base.save_pretrained(directory / tuned_name)
    _copy_tokenizer(source, directory / tuned_name)
    return base.eval()


def _copy_tokenizer(source: str, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    except (OSError, ValueError, KeyError):
        print(f"{source} has no tokenizer to copy into {target}")
