"""Many small values in little memory: as JSON, one after another, in memory or in a file that is mapped into it."""

import json
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, overload

import numpy as np


class Rows(Sequence[Any]):
    """Rows that are made when they are looked at; a slice of them is a list."""

    def row(self, index: int) -> Any:
        """The row of an index from 0 to below the length."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(len(self))[index]]
        return self.row(range(len(self))[index])


class JsonRows(Rows):
    """Values made of dicts, lists, strings and numbers. Tuples in them have become lists.

    Args:
        source: Their JSON, one after another, or the file that holds it.
        ends: Where each ends, in bytes.
    """

    def __init__(self, source: bytes | Path, ends: np.ndarray) -> None:
        self._source = source
        self._ends = ends
        self._mapped: bytes | mmap | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> Any:
        """The value of this index."""
        if self._mapped is None:
            self._mapped = _mapped(self._source)
        start = self._ends[index - 1] if index else 0
        return json.loads(self._mapped[start : self._ends[index]])

    def __getstate__(self) -> dict[str, Any]:
        # A process that loads batches maps the file itself.
        return {**vars(self), "_mapped": None}


class ChosenRows(Rows):
    """Some rows of others, in an order of their own.

    Args:
        rows: The others.
        lengths: How many tokens each of these has.
        indices: Which ones.
    """

    def __init__(self, rows: Sequence[Any], lengths: np.ndarray, indices: np.ndarray) -> None:
        self._rows = rows
        self._indices = indices
        self.lengths = lengths[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> Any:
        """The row of this index."""
        return self._rows[int(self._indices[index])]


def as_json(value: Any) -> bytes:
    """A value as :class:`JsonRows` holds it."""
    return json.dumps(value, separators=(",", ":")).encode()


def _mapped(source: bytes | Path) -> bytes | mmap:
    if isinstance(source, bytes):
        return source
    with source.open("rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ) if source.stat().st_size else b""
