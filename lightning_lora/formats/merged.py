"""The merged model as files: as ``from_pretrained`` opens it, or ``model.safetensors``."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lightning_lora.formats.publish import whole_directory
from lightning_lora.model.targets import pretrained_models
from lightning_lora.sharding import full_shape, full_tensor, is_sharded, is_writer, named_tensors

ADAPTER_DIR = "adapter"
MERGED_DIR = "merged"
_WEIGHT_FILES = ("model*.safetensors*", "model.pt", "pytorch_model*.bin*")  # of an earlier model, in other shards
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_merged(
    model: nn.Module, directory: str | Path, tokenizer: Any | None = None, max_shard_size: str = "5GB"
) -> Path:
    """Write a merged model: a transformers model as ``from_pretrained`` opens it, any other as ``model.safetensors``.

    That format has no sparse, quantized or nested tensors, and nothing else that a state dict may hold. With such, the
    file is ``model.pt``, which ``torch.load`` opens.

    Where processes share the parameters, all must call this together; tensors are gathered one by one, and the first
    process writes each file as soon as it has it.

    Args:
        model: A model without adapters, after ``eject(model, merge=True)``.
        directory: Made if it is not there.
        tokenizer: Saved beside a transformers model, if given.
        max_shard_size: Size above which a transformers model, or one that processes share, is split into several files.

    Returns:
        The directory.
    """
    directory = Path(directory)
    if not is_writer(model):
        return _write(model, directory, tokenizer, max_shard_size)
    with whole_directory(directory, _WEIGHT_FILES) as new:
        _write(model, new, tokenizer, max_shard_size)
    return directory


def _write(model: nn.Module, directory: Path, tokenizer: Any | None, max_shard_size: str) -> Path:
    hf_models = list(pretrained_models(model).values())
    if is_sharded(model):
        _save_gathered(hf_models[0] if len(hf_models) == 1 else model, directory, max_shard_size)
    elif not all(map(_is_storable, model.state_dict().values())):
        torch.save(model.state_dict(), directory / "model.pt")
    elif len(hf_models) == 1:
        with _true_to_ties(hf_models[0]):
            hf_models[0].save_pretrained(directory, max_shard_size=max_shard_size)  # type: ignore[operator]
    else:
        save_model(model, str(directory / "model.safetensors"))
    if len(hf_models) == 1 and is_writer(model):
        if is_sharded(model):
            with _true_to_ties(hf_models[0]):
                hf_models[0].config.save_pretrained(directory)  # type: ignore[union-attr,operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return directory


def _is_storable(value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    return dense and not (value.is_quantized or value.is_nested)


def _save_gathered(model: nn.Module, directory: Path, max_shard_size: str) -> None:
    """Write a model that processes share, in files of a given size, as transformers lays them out."""
    parts: dict[int, tuple[str, nn.Module, str]] = {}
    for name, module, inner in named_tensors(model):
        parts.setdefault(id(getattr(module, inner)), (name, module, inner))  # what is tied once
    files = list(_files(list(parts.values()), _bytes(max_shard_size)))
    weight_map, total = {}, 0
    for number, content in enumerate(files, 1):
        several = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file_name = f"model{several}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, module, inner in content:
            tensor = full_tensor(module, inner)
            weight_map[name], total = file_name, total + tensor.numel() * tensor.element_size()
            if is_writer(model):
                tensors[name] = tensor.cpu().contiguous()
        if is_writer(model):
            save_file(tensors, directory / file_name, {"format": "pt"})
    if len(files) > 1 and is_writer(model):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _files(parts: list[tuple[str, nn.Module, str]], limit: int) -> Iterator[list[tuple[str, nn.Module, str]]]:
    """What goes into each file: as much as the limit allows, and one tensor at least."""
    content: list[tuple[str, nn.Module, str]] = []
    size = 0
    for name, module, inner in parts:
        own = full_shape(module, inner).numel() * getattr(module, inner).element_size()
        if content and size + own > limit:
            yield content
            content, size = [], 0
        content.append((name, module, inner))
        size += own
    yield content


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]B)", size.strip().upper())
    if found is None:
        raise ValueError(f"max_shard_size is {size!r}, but it must be a number and KB, MB or GB, such as '5GB'.")
    return int(found[1]) * _UNITS[found[2]]


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
