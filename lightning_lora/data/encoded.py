"""What became of the records of files: their rows, and what is said of them."""

import io
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lightning_lora.data.json_rows import JsonRows, as_json

_ARRAYS = ("shares", "weights", "counts", "truncated", "notes", "lengths", "row_ends", "place_ends")


class Encoded(NamedTuple):
    """What became of a record.

    Args:
        rows: What the loader yields in batches, mostly one, made of dicts, lists, strings and numbers; none if the
            record is rejected.
        truncated: Whether a part of it had to be left out.
        unused: Fields of the record that are left out.
        reason: Why it is rejected, if it is.
        remarks: What else there is to say of it.
    """

    rows: list[Any]
    truncated: bool = False
    unused: Collection[str] = ()
    reason: str = "too long"
    remarks: Collection[str] = ()


class Note(NamedTuple):
    """What is said of records, which many have in common.

    Args:
        said: Why they are rejected, or remarks.
        unused: Fields that are left out.
    """

    said: tuple[str, ...]
    unused: tuple[str, ...]


class Part(NamedTuple):
    """What became of some records that follow each other, in a form that is cheap to hand over.

    Args:
        rows: The JSON of all rows.
        places: The JSON of where each record is.
        arrays: By the names in :class:`EncodedRecords`.
        notes: What the numbers under ``notes`` mean.
        highest: The greatest token id, or -1.
        errors: What is wrong with records that cannot be used, which are left out.
    """

    rows: bytes
    places: bytes
    arrays: dict[str, np.ndarray]
    notes: list[Note]
    highest: int
    errors: list[str]


class Outcome(NamedTuple):
    """A record that could be used.

    Args:
        where: Its file and line.
        share: A number from 0 to below 1 that its content gives.
        weight: How often it is learned in an epoch.
        found: Its rows.
        tokens: Token ids of the texts in each row.
    """

    where: str
    share: float
    weight: float
    found: Encoded
    tokens: list[list[list[int]]]


def part_of(outcomes: Iterable[Outcome | ValueError]) -> Part:
    """Some records put together."""
    rows: list[bytes] = []
    places: list[bytes] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("shares", "weights", "counts", "truncated", "notes")}
    lengths: list[int] = []
    notes: dict[Note, int] = {}
    errors: list[str] = []
    highest = -1
    for outcome in outcomes:
        if isinstance(outcome, ValueError):
            errors.append(str(outcome))
            continue
        found = outcome.found
        said = sorted(found.remarks) if found.rows else [f"Rejected as {found.reason}"]
        note = notes.setdefault(Note(tuple(said), tuple(sorted(found.unused))), len(notes))
        values = (outcome.share, outcome.weight, len(found.rows), found.truncated, note)
        for column, value in zip(columns.values(), values):
            column.append(value)
        rows += map(as_json, found.rows)
        places.append(as_json(outcome.where))
        lengths += [max(map(len, texts), default=0) for texts in outcome.tokens]
        highest = max([highest, *(max(ids) for texts in outcome.tokens for ids in texts if ids)])
    arrays = {
        "shares": np.array(columns["shares"], np.float64),
        "weights": np.array(columns["weights"], np.float64),
        "counts": np.array(columns["counts"], np.int64),
        "truncated": np.array(columns["truncated"], bool),
        "notes": np.array(columns["notes"], np.int64),
        "lengths": np.array(lengths, np.int64),
        "row_ends": np.cumsum([len(row) for row in rows], dtype=np.int64),
        "place_ends": np.cumsum([len(place) for place in places], dtype=np.int64),
    }
    return Part(b"".join(rows), b"".join(places), arrays, list(notes), highest, errors)


class EncodedRecords:
    """All records that could be used.

    Args:
        rows: Their rows.
        places: File and line of each record.
        arrays: Of each record ``shares``, ``weights``, ``counts`` (of its rows), ``truncated`` and ``notes``; of each
            row ``lengths``, in tokens.
        notes: What the numbers under ``notes`` mean.
        highest: The greatest token id in them, or -1.
    """

    def __init__(
        self, rows: JsonRows, places: JsonRows, arrays: dict[str, np.ndarray], notes: list[Note], highest: int
    ) -> None:
        self.rows, self.places = rows, places
        self.shares, self.weights, self.counts = arrays["shares"], arrays["weights"], arrays["counts"]
        self.truncated, self.notes, self.lengths = arrays["truncated"], arrays["notes"], arrays["lengths"]
        self.named_notes = notes
        self.highest = highest

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max(initial=-1))

    @property
    def times(self) -> np.ndarray:
        """How often each record is learned in an epoch."""
        # Digits of the content's number that say nothing of the side that the record is on.
        return (self.weights.astype(np.int64) + (self.shares * 2**20 % 1 < self.weights % 1)).astype(np.int64)

    def said_of(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Those of these records of which something is said, by what that is."""
        notes = self.notes[records]
        found: dict[str, list[np.ndarray]] = {}
        for number, note in enumerate(self.named_notes):
            for said in note.said:
                found.setdefault(said, []).append(records[notes == number])
        return {said: np.sort(np.concatenate(parts)) for said, parts in found.items() if any(map(len, parts))}

    def unused_in(self, records: np.ndarray) -> set[str]:
        """Fields of these records that are left out."""
        return {field for number in np.unique(self.notes[records]) for field in self.named_notes[number].unused}

    def rows_of(self, records: np.ndarray) -> np.ndarray:
        """Indices of the rows of these records, one after another."""
        counts = self.counts[records]
        starts = np.cumsum(self.counts)[records] - counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(np.repeat(starts, counts) + within)


class Collector:
    """Puts parts together, in memory or in a folder.

    Args:
        folder: Where rows and places are written. Default ``None``: they stay in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {
            name: io.BytesIO() if folder is None else (folder / name).open("wb") for name in ("rows", "places")
        }
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        self._notes: dict[Note, int] = {}
        self._highest = -1
        self.errors: list[str] = []

    def add(self, part: Part) -> None:
        """Add what follows."""
        numbers = np.array([self._notes.setdefault(note, len(self._notes)) for note in part.notes], np.int64)
        before = {"row_ends": self._files["rows"].tell(), "place_ends": self._files["places"].tell()}
        for name, array in part.arrays.items():
            array = numbers[array] if name == "notes" else array
            self._arrays[name].append(array + before[name] if name in before else array)
        self._files["rows"].write(part.rows)
        self._files["places"].write(part.places)
        self._highest = max(self._highest, part.highest)
        self.errors += part.errors

    def finish(self) -> EncodedRecords:
        """All of it; in a folder, as :func:`opened` finds it there."""
        self.add(part_of([]))  # of which the arrays have their types where there is nothing else
        arrays = {name: np.concatenate(found) for name, found in self._arrays.items()}
        if self._folder is None:
            files = {name: file.getvalue() for name, file in self._files.items() if isinstance(file, io.BytesIO)}
            return _records(files, arrays, list(self._notes), self._highest)
        for file in self._files.values():
            file.close()
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array)
        about = {"notes": list(self._notes), "highest": self._highest, "errors": self.errors}
        (self._folder / "about.json").write_text(json.dumps(about))
        return opened(self._folder)[0]

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()


def opened(folder: Path) -> tuple[EncodedRecords, list[str]]:
    """What a :class:`Collector` has left in a folder, mapped into memory, and what was wrong with other records."""
    about = json.loads((folder / "about.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy") for name in _ARRAYS}
    notes = [Note(tuple(said), tuple(unused)) for said, unused in about["notes"]]
    files: dict[str, Path] = {name: folder / name for name in ("rows", "places")}
    return _records(files, arrays, notes, about["highest"]), about["errors"]


def _records(files: Any, arrays: dict[str, np.ndarray], notes: list[Note], highest: int) -> EncodedRecords:
    rows, places = JsonRows(files["rows"], arrays["row_ends"]), JsonRows(files["places"], arrays["place_ends"])
    return EncodedRecords(rows, places, arrays, notes, highest)
