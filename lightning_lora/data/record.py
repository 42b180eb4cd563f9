"""A row of a data file, and what is wrong with rows."""

import re
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

SHOWN = 20  # bad rows that a report names


class Record(NamedTuple):
    """One row of a file.

    Args:
        where: File and line (in Parquet: row), for messages.
        fields: The row's values by field name.
        names: Names that fields have in the file, where a setting renames them.
        weight: How often it is learned in an epoch.
    """

    where: str
    fields: dict[str, Any]
    names: dict[str, str] = {}
    weight: float = 1.0

    def text(self, field: str) -> str:
        """The value of a field that must be a string which is not blank.

        Raises:
            ValueError: If it is anything else.
        """
        value = self.fields.get(field)
        if isinstance(value, str) and not is_blank(value):
            return value
        raise self.error(field, "a string that is not blank")

    def error(self, field: str, expected: str, found: str | None = None) -> ValueError:
        """What to raise for a field: what it holds, what it should hold, what to do."""
        if found is None and field not in self.fields:
            there = ", ".join(repr(self.names.get(name, name)) for name in self.fields)
            found = f"none (the fields are {there or 'none at all'})"
        elif found is None:
            found = f"{short(self.fields[field])} ({type(self.fields[field]).__name__})"
        return ValueError(
            f"{self.where}, field {self.names.get(field, field)!r}: found {found}, expected {expected}. Correct the "
            "row or remove it."
        )

    def renamed(self, fields: dict[str, str]) -> "Record":
        """The same row, with the fields of the file named in the values under the names in the keys."""
        if not fields:
            return self
        others = {name: value for name, value in self.fields.items() if name not in fields.values()}
        mine = {name: self.fields[given] for name, given in fields.items() if given in self.fields}
        return self._replace(fields={**others, **mine}, names=dict(fields))


class BadRows:
    """Collects what is wrong with rows, so that one run names all of them.

    Args:
        on_error: ``"stop"`` raises when all rows were looked at, ``"skip"`` leaves bad rows out and says so. Default
            ``None``: the same as ``"stop"``, where there is no setting that could skip them.
    """

    def __init__(self, on_error: Literal["stop", "skip"] | None = None) -> None:
        self.on_error = on_error
        self.errors: list[str] = []

    def add(self, error: Exception) -> None:
        """Note a row that cannot be used."""
        self.errors.append(str(error))

    def report(self) -> None:
        """Say what was found, if anything was.

        Raises:
            ValueError: With the first 20 bad rows and their number, unless they are to be skipped.
        """
        if not self.errors:
            return
        # Rows are looked at in the order of the split; messages begin with file and line.
        found, self.errors = sorted(self.errors, key=_by_numbers), []
        rows = "\n".join(found[:SHOWN]) + ("\n..." if len(found) > SHOWN else "")
        if self.on_error == "skip":
            rank_zero_warn(f"Left out {len(found)} rows that cannot be used:\n{rows}")
        elif len(found) == 1:
            raise ValueError(found[0])
        else:
            hint = " (on_error: skip leaves them out)" if self.on_error == "stop" else ""
            raise ValueError(f"Found {len(found)} rows that cannot be used{hint}:\n{rows}")


def _by_numbers(text: str) -> list[tuple[int, str]]:
    """Line 2 before line 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or of blanks and characters such as a zero-width space."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
