"""Sharded checkpoints: the directories that strategies write with ``torch.distributed.checkpoint``.

Each process writes a share of the tensors, which here are whole ones, and ``meta.pt`` holds what else a checkpoint has.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_lora.formats.open_file import Objects, open_file

META_FILE = "meta.pt"  # as Lightning 2.6 names it
_MODEL = ("model.", "state_dict.")  # as FSDPStrategy and ModelParallelStrategy call the model
_OPTIMIZER = "optimizer_{}."


def is_directory(path: str | Path) -> bool:
    """Whether this is a sharded checkpoint."""
    return (Path(path) / META_FILE).is_file()


def split_optimizer(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an ``optimizer.state_dict()`` but for single numbers, and the rest, for ``meta.pt``."""
    tensors = {
        f"{index}.{key}": value
        for index, entries in state_dict["state"].items()
        for key, value in entries.items()
        if _is_stored(value)
    }
    rest = {
        index: {key: value for key, value in entries.items() if not _is_stored(value)}
        for index, entries in state_dict["state"].items()
    }
    return tensors, {**state_dict, "state": rest}


def _is_stored(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def read_directory(path: str | Path, objects: Objects = "refuse") -> dict[str, Any]:
    """Read a sharded checkpoint as one of a single file: with ``state_dict`` and ``optimizer_states``, on the CPU.

    ``torch.distributed.checkpoint`` keeps the list of the tensors as a pickled object, so the directory must be of a
    source that you trust.

    Args:
        path: The directory.
        objects: What becomes of objects in ``meta.pt``.

    Raises:
        RuntimeError: If files of it are damaged or missing.
    """
    path = Path(path)
    checkpoint: dict[str, Any] = open_file(path / META_FILE, objects)
    try:
        reader = FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        raise RuntimeError(f"its tensors are incomplete ({error!r}).") from error
    checkpoint["state_dict"] = {
        name.removeprefix(prefix): tensor
        for prefix in _MODEL
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    own = checkpoint.get("lightning_lora", {})
    if "optimizers" in own:
        checkpoint["optimizer_states"] = [
            _join_optimizer(rest, _OPTIMIZER.format(number), tensors) for number, rest in enumerate(own["optimizers"])
        ]
    return checkpoint


def _join_optimizer(rest: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = {index: dict(entries) for index, entries in rest["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            state[int(index)][key] = tensor
    return {**rest, "state": state}
