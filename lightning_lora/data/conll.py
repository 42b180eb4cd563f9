"""Sentences in columns, a word on each line, as the shared tasks of CoNLL and Universal Dependencies have them."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from lightning_lora.data.record import BadRows, Record

_UNIVERSAL = ("id", "tokens", "lemma", "tags", "xpos", "feats", "head", "deprel", "deps", "misc")


def sentences(lines: Iterable[str], file: Path, bad: BadRows) -> Iterator[Record]:
    """The sentences of a file, which blank lines part.

    The fields are ``tokens`` (the first column), ``tags`` (the last, if there is more than one), and those between by
    their numbers, from ``2``. In ``.conllu``, ``tags`` are the universal parts of speech, and the other columns have
    their names. Lines that begin with ``#`` in ``.conllu``, and those of ``-DOCSTART-``, are left out.

    Args:
        lines: Of the file.
        file: Its name, for messages.
        bad: Where sentences whose lines differ in their number of columns are noted.
    """
    universal = ".conllu" in file.name.lower()
    rows: list[list[str]] = []
    first = 0
    for number, line in enumerate(chain(lines, [""]), start=1):
        columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not line.strip():
            if rows:
                yield from _sentence(rows, f"{file}, line {first}", universal, bad)
            rows = []
        elif not (universal and line.startswith("#")) and columns[0] != "-DOCSTART-":
            # A word of several, such as "don't", and words that are not there, have numbers such as 1-2 and 1.1.
            if universal and not columns[0].isdecimal():
                continue
            first = first if rows else number
            rows.append(columns)


def _sentence(rows: list[list[str]], where: str, universal: bool, bad: BadRows) -> Iterator[Record]:
    width = len(_UNIVERSAL) if universal else len(rows[0])
    odd = next((row for row in rows if len(row) != width), None)
    if odd is not None:
        bad.add(
            ValueError(
                f"{where}: found a sentence with {len(odd)} columns in the line of {odd[0]!r}, expected {width} in "
                "each, and a blank line between sentences. Correct the line."
            )
        )
        return
    names = _UNIVERSAL if universal else ("tokens", *map(str, range(2, width)), "tags")
    yield Record(where, {name: list(column) for name, column in zip(names, zip(*rows), strict=False)})
