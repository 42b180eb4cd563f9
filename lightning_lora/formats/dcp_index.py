"""The index of a sharded checkpoint, ``.metadata``: where each tensor is. It is a pickle, read without its objects."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_lora.formats.pickled import Unpickler, require_modest

# The classes whose objects torch pickles into it. Their values are read, and they themselves are not.
_TORCH = "torch.distributed.checkpoint"
_METADATA = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_RECORDS = {
    *((f"{_TORCH}.metadata", name) for name in _METADATA),
    (f"{_TORCH}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class Chunk(NamedTuple):
    """A part of a tensor in a file.

    Attributes:
        shape: Of the whole tensor.
        dtype: Its type.
        at: Where the part begins in the tensor.
        size: Its shape.
        file: Name of the file.
        offset: Where it begins there, in bytes.
        length: How long it is, in bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    at: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    offset: int
    length: int


class _Record:
    """Stands in the place of an object: keeps what it would have been made of."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


class _Reader(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {})  # one of its own, for a file may ask to change it
        raise pickle.UnpicklingError(f"its index holds a {module}.{name}, which no index of torch does.")


def read_index(path: Path) -> dict[str, list[Chunk]]:
    """The parts of each tensor, at least one, by the tensor's name.

    Raises:
        RuntimeError: If it is damaged, missing or holds what no index of torch does.
    """
    try:
        content = path.read_bytes()
        require_modest(content)
        index = _Reader(io.BytesIO(content)).load()
        places = {(key["fqn"], _at(key["offset"])): place for key, place in index["storage_data"].items()}
        found = {
            name: [
                _chunk(entry, _at(chunk["offsets"]), _at(chunk["sizes"]), places[name, _at(chunk["offsets"])])
                for chunk in entry["chunks"]
            ]
            for name, entry in index["state_dict_metadata"].items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
        if not all(found.values()):
            raise ValueError("a tensor has no parts")
        return found
    except Exception as error:  # of whatever kind a damaged or hostile pickle raises, where nothing of its own is run
        raise RuntimeError(f"its tensors are incomplete, or its index is damaged ({error}).") from error


def _chunk(entry: _Record, at: tuple[int, ...], size: tuple[int, ...], place: Mapping[str, Any]) -> Chunk:
    shape, dtype = _at(entry["size"]), entry["properties"].state[0]
    inside = len(shape) == len(at) == len(size) and all(a + s <= whole for a, s, whole in zip(at, size, shape))
    if not isinstance(dtype, torch.dtype) or not inside or _is_wrapped(place):
        raise ValueError("a part of a tensor is not in it")
    file, offset, length = place["relative_path"], place["offset"], place["length"]
    if not (isinstance(file, str) and _is_count(offset) and _is_count(length)):
        raise ValueError("a place is none")
    return Chunk(shape, dtype, at, size, file, offset, length)


def _is_wrapped(place: Any) -> bool:
    """Whether a part was compressed or encrypted by an extension of torch's."""
    return bool(place.state.get("transform_descriptors"))


def _at(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or not all(map(_is_count, numbers)):
        raise ValueError("a shape is none")
    return numbers


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
