"""Rows of data files, each with the place to name when something is wrong with it."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import IO, Any

from lightning_lora.data.conll import sentences
from lightning_lora.data.hub import HUB, hub_files, hub_records
from lightning_lora.data.record import BadRows, Record
from lightning_lora.shipped_recipes import SHIPPED, locate

__all__ = ["Record", "read_records"]

# Files, or files by the weights of their rows.
Paths = str | list[str] | dict[str, float]

_QUOTED = re.compile(r'"[^"]*"')
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_records(path: Paths, bad: BadRows | None = None) -> Iterator[Record]:
    """The rows of one file or of several, which are looked for at once; blank lines are skipped.

    Args:
        path: A file, a folder (all files in it that can be read, by name), a pattern such as ``data/*.jsonl``,
            ``shipped:<name>``, ``hf:<id>`` (see :mod:`lightning_lora.data.hub`), a list of these, or these with the
            weight of the rows of each. A file is
            ``.jsonl`` (one JSON object per line), ``.json`` (an array of objects, or as ``.jsonl``), ``.csv`` or
            ``.tsv`` (with a header; commas, semicolons and tabs are told apart), ``.conll``, ``.conllu`` or ``.bio``
            (words in columns, see :mod:`lightning_lora.data.conll`) or ``.parquet`` (read by pyarrow), all but the last
            also as ``.gz``, or as ``.zst`` (read by pyarrow). Text is UTF-8, or UTF-16 with a byte order mark.
        bad: Where rows that cannot be read are noted. Default ``None``: they raise, after the last row.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: For Parquet without pyarrow, or a data set of the hub without datasets.
        ValueError: For another kind of file, one that is empty, a row that cannot be read, or a weight that is not
            positive.
    """
    files: list[tuple[str | Path, float]] = []
    for one in [path] if isinstance(path, str) else path:
        weight = path[one] if isinstance(path, dict) else 1.0
        if not 0 < weight < math.inf:
            raise ValueError(f"Found the weight {weight} of {one!r}, expected a positive number, such as 0.5.")
        files += [(file, weight) for file in ([one] if one.startswith(HUB) else _files(one))]
    return _records(files, bad)


def data_files(path: Paths) -> list[Path]:
    """The files on this machine that hold the rows of a path."""
    paths = [path] if isinstance(path, str) else path
    return [file for one in paths for file in (hub_files(one) if one.startswith(HUB) else _files(one))]


def _records(files: list[tuple[str | Path, float]], bad: BadRows | None) -> Iterator[Record]:
    collected = bad or BadRows()
    for file, weight in files:
        empty, errors = True, len(collected.errors)
        for record in hub_records(file) if isinstance(file, str) else _read(file, collected):
            empty = False
            yield record if weight == 1 else record._replace(weight=weight)
        if empty and len(collected.errors) == errors:
            raise ValueError(f"{file}: found no rows, expected at least one.")
    if bad is None:
        collected.report()


def _files(path: str) -> list[Path]:
    folder = Path(path)
    if not path.startswith(SHIPPED) and not folder.is_file():
        inside = sorted(folder.iterdir()) if folder.is_dir() else [Path(match) for match in sorted(glob(path))]
        found = [file for file in inside if file.is_file() and _kind(file) in _READERS]
        if found:
            return found
        if folder.is_dir():
            raise FileNotFoundError(
                f"Found no file in the folder {path!r} whose name ends in {', '.join(_READERS)}, expected at least one."
            )
    file = locate(path)
    if _kind(file) not in _READERS:
        raise ValueError(
            f"Found the data file {str(file)!r}, expected a name that ends in {', '.join(_READERS)}, or in one of "
            "these and .gz or .zst. Convert or rename it."
        )
    return [file]


def _kind(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def _read(file: Path, bad: BadRows) -> Iterator[Record]:
    try:
        yield from _READERS[_kind(file)](file, bad)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: found bytes that are not UTF-8 ({error}), expected UTF-8, or UTF-16 with a byte order mark. Save "
            "the file in that encoding."
        ) from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: found no whole gzip file ({error}). Copy it again.") from None
    except OSError as error:
        if file.suffix.lower() != ".zst":
            raise
        raise ValueError(f"{file}: found no whole zstandard file ({error}). Copy it again.") from None


def _open(file: Path) -> IO[str]:
    # Any: the kinds of files have no common type.
    data: Any = _zstandard(file) if file.suffix.lower() == ".zst" else None
    data = data or (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb")
    start = data.peek(4)
    # Editors on Windows put a byte order mark in front.
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(data, encoding, newline="")


def _zstandard(file: Path) -> IO[bytes]:
    try:
        import pyarrow  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError(f'{file}: reading .zst needs pyarrow. Run: pip install "lightning-lora[parquet]"') from None
    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


def _jsonl(file: Path, bad: BadRows) -> Iterator[Record]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                yield _record(where, _parsed(line))
            except json.JSONDecodeError as error:
                bad.add(
                    ValueError(
                        f"{where}: found no valid JSON ({error}), expected one object per line. Correct the line or "
                        "remove it."
                    )
                )
            except ValueError as error:
                bad.add(error if str(error).startswith(where) else ValueError(f"{where}: {error}"))


def _json(file: Path, bad: BadRows) -> Iterator[Record]:
    with _open(file) as lines:
        text = lines.read()
    if not text.lstrip().startswith("["):
        # Many data sets have JSON Lines under this name; one object alone may go over several lines.
        try:
            yield _record(f"{file}, line 1", _parsed(text))
        except json.JSONDecodeError:
            yield from _jsonl(file, bad)
        return
    decoder, position = json.JSONDecoder(object_pairs_hook=_once), text.index("[") + 1
    counted = line = 0
    while True:
        position = _after_blanks(text, position)
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise ValueError(
                    f"{file}, line {line + 1 + text.count(chr(10), counted, position)}: found more behind the array "
                    "that ends here, expected one array of objects. Correct the file."
                )
            return
        line, counted = line + text.count("\n", counted, position), position
        where = f"{file}, line {line + 1}"
        try:
            value, position = decoder.raw_decode(text, position)
            position = _after_blanks(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            # Where the next row begins cannot be told any more.
            raise ValueError(
                f"{where}: found no valid JSON in the row that begins here ({error}), expected an array of objects. "
                "Correct the file."
            ) from None
        try:
            yield _record(where, value)
        except ValueError as error:
            bad.add(error)
        position += text[position] == ","


def _after_blanks(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise json.JSONDecodeError("too deep", text[:1], 0) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"found the field {twice!r} twice, expected it once. Correct the row or remove it.")
    return found


def _record(where: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise ValueError(
            f"{where}: found a JSON {type(fields).__name__}, expected an object. Correct the line or remove it."
        )
    record = Record(where, fields)
    for field, value in fields.items():
        if broken := _broken_text(value):
            raise record.error(field, "whole characters", f"half of one (a lone surrogate) in {broken!r}")
    return record


def _broken_text(value: Any) -> str | None:
    """The first text that is cut inside a character, as JSON's escapes can be, which no tokenizer takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return value[max(0, error.start - 20) : error.end + 20]
        return None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_broken_text, parts)), None)


def _csv(file: Path, bad: BadRows) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with _open(file) as lines:
        header = lines.readline()
        # What separates the names in the header separates the values too.
        delimiter = max(",;\t", key=_QUOTED.sub("", header).count)
        reader = csv.DictReader(chain([header], lines), strict=True, delimiter=delimiter)
        try:
            names = list(reader.fieldnames or [])
        except csv.Error as error:
            raise ValueError(f"{file}, line 1: found no valid CSV ({error}). Correct the header.") from None
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(
                f"{file}, line 1: found the header {', '.join(map(repr, names))}, expected each field's name once. "
                "Name every column."
            )
        try:
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                # DictReader puts surplus values under the key None, and None where values are missing.
                if None in fields or None in fields.values():
                    found = "more" if None in fields else "fewer"
                    bad.add(
                        ValueError(
                            f"{where}: found {found} values than the header's {len(names)} fields "
                            f"({', '.join(map(repr, names))}). Quote values that hold {_NAMES[delimiter]} or line "
                            "breaks, or remove the row."
                        )
                    )
                elif delimiter == "\t" and any("\t" in value and "\n" in value for value in fields.values()):
                    # Tables with tabs are mostly written without quotes, so that one may begin any value.
                    bad.add(
                        ValueError(
                            f"{where}: found a quote that holds tabs and line breaks, such as a quotation mark in a "
                            "file without quoting gives, expected a row on each line. Double the mark, and quote its "
                            "value."
                        )
                    )
                else:
                    yield Record(where, fields)
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {reader.reader.line_num}: found no valid CSV ({error}). Correct the line or remove it."
            ) from None


def _conll(file: Path, bad: BadRows) -> Iterator[Record]:
    with _open(file) as lines:
        yield from sentences(lines, file, bad)


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


_BATCH = 1000  # rows of Parquet that are in memory at once


def _parquet(file: Path, bad: BadRows) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid, parquet  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError(
            f"{file}: reading Parquet needs pyarrow, which is not installed. Run: pip install pyarrow"
        ) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(file, memory_map=True).iter_batches(_BATCH):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{file}, row {number}", fields)
    except ArrowInvalid as error:
        raise ValueError(f"{file}: found no valid Parquet ({error}). Write the file again.") from None


_READERS: dict[str, Callable[[Path, BadRows], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".conll": _conll,
    ".conllu": _conll,
    ".bio": _conll,
}
