"""Sharded checkpoints: the directories that strategies write with ``torch.distributed.checkpoint``.

Each process writes a share of the tensors, which here are whole ones, and ``meta.pt`` holds what else a checkpoint has.
"""

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.formats.dcp_index import Chunk, read_index
from lightning_lora.formats.open_file import Objects, open_file, open_part
from lightning_lora.formats.schema import require_type
from lightning_lora.formats.sizes import has_own_values

CHECKSUMS_FILE = "checksums.json"  # each file's size and CRC-32; also the mark of a directory that is complete
META_FILE = "meta.pt"  # as Lightning 2.6 names it
INDEX_FILE = ".metadata"  # as torch names it
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


def write_checksums(directory: Path) -> None:
    """Add to a directory that all processes have written to what tells later whether its files are as they were."""
    sums = {path.name: _size_and_crc(path) for path in sorted(directory.iterdir()) if path.name != CHECKSUMS_FILE}
    (directory / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def _require_files(directory: Path) -> None:
    """Require that all in a directory is a file or another directory: what else has a name may never come to an end."""
    for path in directory.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise RuntimeError(f"{path.name!r} in it is no file.")


def _require_own_bytes(directory: Path, chunks: list[Chunk]) -> None:
    """Require that no parts of tensors share their bytes, by which a small file would stand for many tensors."""
    lengths = {chunk.file: 0 for chunk in chunks}
    for chunk in chunks:
        lengths[chunk.file] += chunk.length
    for name, length in lengths.items():
        path = directory / _plain(name)
        if path.exists() and length > path.stat().st_size:
            raise RuntimeError(f"its index names more parts in {name!r} than that file has bytes.")


def _require_intact(directory: Path) -> None:
    path = directory / CHECKSUMS_FILE
    if not path.exists():  # written without this package, or by an earlier version
        return
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{CHECKSUMS_FILE} in it is damaged ({error}).") from error
    require_type(sums, dict[str, list[int]], str(path))
    for name, expected in sums.items():
        if not (directory / _plain(name)).is_file() or _size_and_crc(directory / name) != expected:
            raise RuntimeError(f"{name!r} in it is missing, or not what was written: its checksum is another one.")


def _size_and_crc(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]


def _plain(name: str) -> str:
    """A name of a file in the directory itself.

    Raises:
        RuntimeError: If it leads elsewhere.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
        raise RuntimeError(f"its index names {name!r}, which is no file in it.")
    return name


def read_directory(path: str | Path, objects: Objects = "refuse") -> dict[str, Any]:
    """Read a sharded checkpoint as one of a single file: with ``state_dict`` and ``optimizer_states``, on the CPU.

    ``torch.distributed.checkpoint`` keeps the list of the tensors as a pickled object, of which only the values are
    read: no object in it is made. Files outside of the directory are not opened.

    Args:
        path: The directory.
        objects: What becomes of objects in ``meta.pt``.

    Raises:
        RuntimeError: If files of it are damaged or missing.
    """
    path = Path(path)
    _require_files(path)
    _require_intact(path)
    checkpoint: dict[str, Any] = open_file(path / META_FILE, objects)
    require_type(checkpoint, dict[str, Any], str(path / META_FILE))
    index = read_index(path / INDEX_FILE)
    _require_own_bytes(path, [chunk for chunks in index.values() for chunk in chunks])
    tensors = {name: _read_tensor(path, name, chunks) for name, chunks in index.items()}
    checkpoint["state_dict"] = {
        name.removeprefix(prefix): tensor
        for prefix in _MODEL
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    own = checkpoint.get("lightning_lora")
    if isinstance(own, dict) and "optimizers" in own:
        require_type(own["optimizers"], list[Any], str(path / META_FILE), "lightning_lora.optimizers")
        checkpoint["optimizer_states"] = [
            _join_optimizer(rest, _OPTIMIZER.format(number), tensors) for number, rest in enumerate(own["optimizers"])
        ]
    return checkpoint


def _read_tensor(directory: Path, name: str, chunks: list[Chunk]) -> Tensor:
    """Put a tensor together out of its chunks, each of which is a whole file of ``torch.save`` in a larger one."""
    parts = [_read_chunk(directory, name, chunk) for chunk in chunks]
    shape = chunks[0].shape
    if sum(part.numel() for part in parts) != math.prod(shape):  # before memory is taken for what the index says
        raise RuntimeError(f"its tensors are incomplete: the parts of {name!r} do not make up {shape}.")
    tensor = torch.empty(shape, dtype=parts[0].dtype)
    for chunk, part in zip(chunks, parts):
        tensor[tuple(slice(at, at + size) for at, size in zip(chunk.at, chunk.size))] = part
    return tensor


def _read_chunk(directory: Path, name: str, chunk: Chunk) -> Tensor:
    try:
        part: Any = open_part(directory / _plain(chunk.file), chunk.offset, chunk.length)
    except OSError as error:
        raise RuntimeError(f"its tensors are incomplete ({error!r}).") from error
    fits = isinstance(part, Tensor) and part.layout is torch.strided and not part.is_meta and has_own_values(part)
    if not fits or tuple(part.shape) != chunk.size or part.dtype != chunk.dtype:
        raise RuntimeError(f"{chunk.file!r} in it does not hold {name!r} as its index says.")
    found: Tensor = part
    return found


def _join_optimizer(rest: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = {index: dict(entries) for index, entries in rest["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            state[int(index)][key] = tensor
    return {**rest, "state": state}
