"""What a finished run leaves for others to use: the adapter in PEFT's format and, beside it, the merged model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from safetensors.torch import save_model
from torch import nn

from lightning_lora.targets import pretrained_models

ADAPTER_DIR = "adapter"
MERGED_DIR = "merged"


def save_merged(
    model: nn.Module, directory: Union[str, Path], tokenizer: Optional[Any] = None, max_shard_size: str = "5GB"
) -> Path:
    """Write a merged model: a transformers model as ``from_pretrained`` opens it, any other as ``model.safetensors``.

    Args:
        model: A model without adapters, after ``eject(model, merge=True)``.
        directory: Made if it is not there.
        tokenizer: Saved beside a transformers model, if given.
        max_shard_size: Size above which a transformers model is split into several files.

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf_models = list(pretrained_models(model).values())
    if len(hf_models) == 1:
        with _true_to_ties(hf_models[0]):
            hf_models[0].save_pretrained(directory, max_shard_size=max_shard_size)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    else:
        save_model(model, str(directory / "model.safetensors"))
    return directory


@contextmanager
def _true_to_ties(hf_model: Any) -> Iterator[None]:
    """Say in the saved config that the output head is untied, if merging an adapter into it made it so."""
    head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    untied = (
        getattr(hf_model.config, "tie_word_embeddings", False)
        and head is not None
        and getattr(head, "weight", None) is not getattr(embedding, "weight", None)
    )
    if untied:
        hf_model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        if untied:
            hf_model.config.tie_word_embeddings = True
