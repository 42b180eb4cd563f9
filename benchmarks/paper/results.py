"""The figures as they were measured: a line of JSON for each run, so that an interruption loses one run."""

import json
from pathlib import Path
from typing import Any

from benchmarks.paper.contenders import TASKS, kind_of

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Add a row."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def chosen_rate(task: str, contender: str, runs: list[Row]) -> float:
    """The learning rate that scored best in the search for this kind of contender.

    Raises:
        ValueError: If there was no search.
    """
    kind = kind_of(contender)
    searched = [run for run in runs if run["search"] and run["task"] == task and kind_of(run["contender"]) == kind]
    if not searched:
        raise ValueError(f"Found no search for {kind} on {task}, expected one. Run: python -m benchmarks.paper search")
    sign = 1 if TASKS[task].higher_is_better else -1
    best: float = max(searched, key=lambda run: sign * run["quality"])["lr"]
    return best
