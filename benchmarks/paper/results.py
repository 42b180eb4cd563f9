"""The figures as they were measured: a line of JSON for each run, so that an interruption loses one run."""

import json
from pathlib import Path
from typing import Any

from benchmarks.paper.contenders import TASKS, kind_of

Row = dict[str, Any]
# Scores closer than this are taken for equal.
TIE = 0.01


def read(path: Path) -> list[Row]:
    """All rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Add a row."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def chosen_rate(task: str, contender: str, runs: list[Row]) -> float:
    """The learning rate that scored best in the search for this kind of contender, or the lowest that nearly did.

    Raises:
        ValueError: If there was no search.
    """
    kind = kind_of(contender)
    searched = [run for run in runs if run["search"] and run["task"] == task and kind_of(run["contender"]) == kind]
    if not searched:
        raise ValueError(f"Found no search for {kind} on {task}, expected one. Run: python -m benchmarks.paper search")
    sign = 1 if TASKS[task].higher_is_better else -1
    best = max(sign * run["quality"] for run in searched)
    return min(run["lr"] for run in searched if sign * run["quality"] >= best - TIE)
