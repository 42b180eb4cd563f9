"""What a run logged, by step: ``learning_curve.csv``, and the ``metrics.csv`` of Lightning's ``CSVLogger``."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_lora.formats.publish import whole_file
from lightning_lora.model.state_dict import CheckpointError

Curves = dict[str, list[tuple[int, float]]]

CURVE_FILE = "learning_curve.csv"
METRICS_FILE = "metrics.csv"
SPEED = ("tokens_per_second", "rows_per_second", "minutes_left", "peak_memory_gb")  # what ``Throughput`` logs


def read_metrics(table: Path) -> Curves:
    """The curves in a ``metrics.csv``, by the metric's name.

    Raises:
        CheckpointError: If it is damaged.
    """
    return _curves(
        table,
        lambda row: [
            (name, row["step"], value) for name, value in row.items() if value and name not in ("epoch", "step")
        ],
    )


def read_curves(table: Path) -> Curves:
    """The curves in a ``learning_curve.csv``, by the metric's name.

    Raises:
        CheckpointError: If it is damaged.
    """
    return _curves(table, lambda row: [(row["metric"], row["step"], row["value"])])


def _curves(table: Path, points: Callable[[dict[str, Any]], list[tuple[str, str, str]]]) -> Curves:
    """The curves in a table, by what a row of it holds: names, steps and values."""
    curves: Curves = {}
    try:
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, step, value in points(row):
                    curves.setdefault(name, []).append((int(step), float(value)))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(
            f"{table} is damaged ({type(error).__name__}: {error}): remove it, or copy it again."
        ) from error
    return curves


def write_curves(curves: Curves, table: Path) -> None:
    """Write a ``learning_curve.csv``."""
    with whole_file(table) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "step", "value"])
        writer.writerows((name, *point) for name, points in curves.items() for point in points)
