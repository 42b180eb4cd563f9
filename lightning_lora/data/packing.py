"""Several rows in one, so that no step is spent on padding."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED, Row


def pack(rows: list[Row], max_length: int) -> list[Row]:
    """Put rows together in as few packs of at most ``max_length`` tokens as best-fit-decreasing finds, in n log n.

    Each row's ``position_ids`` begin at zero, by which transformers tells the rows in a pack apart: no token attends to
    those of another row. The first label of each row is ignored already, so no row predicts the next one's beginning.

    Args:
        rows: With ``input_ids`` and ``labels``, each of at most ``max_length`` tokens.
        max_length: Longest pack, in tokens.

    Returns:
        Rows with ``input_ids``, ``labels`` and ``position_ids``.
    """
    packs: list[list[Row]] = []
    # Packs by the room that is left in them, and those rooms in order.
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    # `sorted` is stable, so equal files give equal packs.
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
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
    return [
        {
            "input_ids": [token for row in pack for token in row["input_ids"]],
            "labels": [label for row in pack for label in row["labels"]],
            "position_ids": [position for row in pack for position in range(len(row["input_ids"]))],
        }
        for pack in packs
    ]


def unpack(row: Row) -> Iterator[Row]:
    """The rows in a pack, without their positions; a row that is no pack as it is."""
    starts = [index for index, position in enumerate(row.get("position_ids", [0])) if position == 0]
    for start, end in zip(starts, [*starts[1:], None]):
        yield {field: row[field][start:end] for field in ("input_ids", "labels")}


def collate_packs(packs: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Batch packs of :func:`pack`; the padding at the end of each is a row of its own, which is not learned.

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
