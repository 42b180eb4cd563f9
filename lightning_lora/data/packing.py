"""Several rows in one, so that no step is spent on padding."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED, Row
from lightning_lora.data.json_rows import Rows


def pack(rows: Sequence[Row], max_length: int, lengths: Sequence[int] | None = None) -> "Packs":
    """Put rows together in as few packs of at most ``max_length`` tokens as best-fit-decreasing finds, in n log n.

    Args:
        rows: With ``input_ids`` and ``labels``, each of at most ``max_length`` tokens.
        max_length: Longest pack, in tokens.
        lengths: Tokens of each row, where they are known, so that no row is looked at.

    Returns:
        Rows with ``input_ids``, ``labels`` and ``position_ids``.
    """
    if lengths is None:
        lengths = [len(row["input_ids"]) for row in rows]
    packs: list[list[int]] = []
    # Packs by the room that is left in them, and those rooms in order.
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    # `sorted` is stable, so equal files give equal packs.
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            index, room = len(packs), max_length
            packs.append([])
        else:
            room = rooms[place]
            index = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[index].append(row)
        if room - length not in with_room:
            with_room[room - length] = []
            insort(rooms, room - length)
        with_room[room - length].append(index)
    return Packs(rows, packs)


def joined(rows: Iterable[Row]) -> Row:
    """Rows as one, whose ``position_ids`` begin at zero with each, by which transformers tells them apart.

    No token attends to those of another row. The first label of each row is ignored already, so no row predicts the
    next one's beginning.
    """
    pack: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        pack["input_ids"] += row["input_ids"]
        pack["labels"] += row["labels"]
        pack["position_ids"] += range(len(row["input_ids"]))
    return pack


class Packs(Rows):
    """Rows in packs, joined when they are looked at.

    Args:
        rows: The rows.
        packs: The indices of the rows in each.
    """

    def __init__(self, rows: Sequence[Row], packs: list[list[int]]) -> None:
        self._rows = rows
        self._packs = packs

    def __len__(self) -> int:
        return len(self._packs)

    def row(self, index: int) -> Row:
        """The pack of this index."""
        return joined(self._rows[row] for row in self._packs[index])


def unpack(row: Row) -> Iterator[Row]:
    """The rows in a pack, without their positions; a row that is no pack as it is."""
    starts = [index for index, position in enumerate(row.get("position_ids", [0])) if position == 0]
    for start, end in zip(starts, [*starts[1:], None]):
        yield {field: row[field][start:end] for field in ("input_ids", "labels")}


def collate_packs(packs: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Batch packs of :func:`joined`; the padding at the end of each is a row of its own, which is not learned.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each of shape ``(packs, tokens of the longest)``. There is no
        ``attention_mask``, since transformers separates rows by their positions only without one.
    """
    length = max(len(pack["input_ids"]) for pack in packs)

    def padded(field: str, padding: Callable[[int], list[int]]) -> Tensor:
        return torch.tensor([pack[field] + padding(length - len(pack[field])) for pack in packs])

    return {
        "input_ids": padded("input_ids", lambda count: [pad_token_id] * count),
        "labels": padded("labels", lambda count: [IGNORED] * count),
        "position_ids": padded("position_ids", lambda count: list(range(count))),
    }
