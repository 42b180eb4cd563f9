"""What a run logged, by step: ``learning_curve.csv``, and the ``metrics.csv`` of Lightning's ``CSVLogger``."""

import csv
from pathlib import Path

from lightning_lora.formats.publish import whole_file

Curves = dict[str, list[tuple[int, float]]]

CURVE_FILE = "learning_curve.csv"
METRICS_FILE = "metrics.csv"
SPEED = ("tokens_per_second", "rows_per_second", "minutes_left", "peak_memory_gb")  # what ``Throughput`` logs


def read_metrics(table: Path) -> Curves:
    """The curves in a ``metrics.csv``, by the metric's name."""
    curves: Curves = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def read_curves(table: Path) -> Curves:
    """The curves in a ``learning_curve.csv``, by the metric's name."""
    curves: Curves = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    return curves


def write_curves(curves: Curves, table: Path) -> None:
    """Write a ``learning_curve.csv``."""
    with whole_file(table) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "step", "value"])
        writer.writerows((name, *point) for name, points in curves.items() for point in points)
