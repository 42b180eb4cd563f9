"""Rows of a data file, each with the place to name when something is wrong with it."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lora.shipped_recipes import locate


class Record(NamedTuple):
    """One row of a file.

    Args:
        where: File and line (in Parquet: row), for messages.
        fields: The row's values by field name.
    """

    where: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """The value of a field that must be a string which is not blank.

        Raises:
            ValueError: If it is anything else.
        """
        value = self.fields.get(field)
        if isinstance(value, str) and value.strip():
            return value
        raise self.error(field, "a string that is not blank")

    def error(self, field: str, expected: str, found: str | None = None) -> ValueError:
        """What to raise for a field: what it holds, what it should hold, what to do."""
        if found is None and field not in self.fields:
            found = f"none (the fields are {', '.join(map(repr, self.fields)) or 'none at all'})"
        elif found is None:
            found = f"{_short(self.fields[field])} ({type(self.fields[field]).__name__})"
        return ValueError(
            f"{self.where}, field {field!r}: found {found}, expected {expected}. Correct the row or remove it."
        )


def read_records(path: str) -> list[Record]:
    """All rows of a JSONL, CSV or Parquet file; blank lines are skipped.

    Args:
        path: A file whose name ends in ``.jsonl`` (one JSON object per line), ``.csv`` (with a header) or ``.parquet``
            (read by pyarrow), or ``shipped:<name>``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: For Parquet without pyarrow.
        ValueError: For another kind of file, one that is empty, or the first row that cannot be read.
    """
    file = locate(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Found the data file {path!r}, expected a name that ends in {', '.join(_READERS)}. Convert or rename it."
        )
    try:
        records = list(reader(file))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: found bytes that are not UTF-8 ({error}), expected UTF-8. Save the file in that encoding."
        ) from None
    if not records:
        raise ValueError(f"{file}: found no rows, expected at least one.")
    return records


def _jsonl(file: Path) -> Iterator[Record]:
    # utf-8-sig: editors on Windows put a byte order mark in front.
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: found no valid JSON ({error}), expected one object per line. Correct the line or "
                    "remove it."
                ) from None
            if not isinstance(fields, dict):
                raise ValueError(
                    f"{where}: found a JSON {type(fields).__name__}, expected an object. Correct the line or remove it."
                )
            yield Record(where, fields)


def _csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                # DictReader puts surplus values under the key None, and None where values are missing.
                if None in fields or None in fields.values():
                    found = "more" if None in fields else "fewer"
                    raise ValueError(
                        f"{where}: found {found} values than the header's {len(reader.fieldnames or [])} fields "
                        f"({', '.join(map(repr, reader.fieldnames or []))}). Quote values that hold commas or line "
                        "breaks, or remove the row."
                    )
                yield Record(where, fields)
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {reader.reader.line_num}: found no valid CSV ({error}). Correct the line or remove it."
            ) from None


def _parquet(file: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError(
            f"{file}: reading Parquet needs pyarrow, which is not installed. Run: pip install pyarrow"
        ) from None
    for number, fields in enumerate(parquet.read_table(file).to_pylist(), start=1):
        yield Record(f"{file}, row {number}", fields)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
