"""How long the texts of a data module are, in tokens, and how many of these are learned."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_lora.data.from_files import FileData

_BARS = 10


class Lengths(NamedTuple):
    """Of all texts of some rows.

    Attributes:
        texts: How many there are.
        tokens: Of all of them.
        learned: How many of these are learned.
        first: Length at which the histogram begins, that of the shortest text.
        step: Width of its bars.
        counts: How many texts are in each of its bars, of which there are ten at most.
    """

    texts: int
    tokens: int
    learned: int
    first: int
    step: int
    counts: list[int]


def lengths_of(data: FileData, rows: Iterable[Any]) -> Lengths | None:
    """The lengths of the texts in rows of a data module that is set up; ``None`` where there are no texts."""
    rows = list(rows)
    lengths = [len(ids) for row in rows for ids in data.token_ids(row)]
    if not lengths:
        return None
    learned = sum(sum(flags) for row in rows for flags in data.learned(row))
    first = min(lengths)
    step = -(-(max(lengths) - first + 1) // _BARS)
    counts = [0] * (1 + (max(lengths) - first) // step)
    for length in lengths:
        counts[(length - first) // step] += 1
    return Lengths(len(lengths), sum(lengths), learned, first, step, counts)
