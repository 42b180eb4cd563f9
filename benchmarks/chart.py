"""Draw ``benchmarks/results/speed.png`` from the figures that ``step`` and ``scaling`` wrote, and ``end_to_end.png``.

It needs matplotlib, which comes with the ``plot`` extra.

    python -m benchmarks.chart
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

COLORS = {"ours": "tab:blue", "PEFT": "tab:orange", "full": "tab:gray"}
WHOLE_RUNS = {"ours": "tab:blue", "TRL": "tab:orange"}
SHORT = 128  # tokens of a pack, of which batches grow
AXES = ("rank", "hidden", "layers", "tokens")


def bars(axes: Any, rows: dict[str, dict[str, float]]) -> None:
    """The step of each contender over the floor."""
    shown = [name for name in rows if name != "floor"]
    for position, name in enumerate(shown):
        row = rows[name]
        reach = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
        color = COLORS[name.split(",")[0]]
        axes.bar(position, row["median"] - 1, bottom=1, color=color, yerr=reach, capsize=3)
        axes.text(position, row["high"] + 0.01, f"{row['median']:.2f}", ha="center")
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(shown)), [name.replace(", ", "\n") for name in shown])
    axes.set_title("a training step over the floor")


def curves(axes: Any, axis: str, rows: dict[str, Any]) -> None:
    """The same against one of the sizes."""
    values = [int(value) for value in rows]
    for name, color in COLORS.items():
        points = [row.get(name) or row[f"{name}, all"] for row in rows.values()]
        axes.plot(values, [point["median"] for point in points], marker="o", markersize=3, color=color, label=name)
        axes.fill_between(
            values, [point["low"] for point in points], [point["high"] for point in points], color=color, alpha=0.2
        )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_title(f"against {axis}")


def whole_runs(pyplot: Any, rows: dict[str, dict[str, Any]]) -> Any:
    """Tokens a second and peak memory of the longest series of runs, against the length of packs and their number."""
    runs = [row for row in rows.values() if row["task"] == "chat" and not row["dropout"] and row["isa"] == _first(rows)]
    figure, panels = pyplot.subplots(1, 4, figsize=(16, 3.4), layout="constrained")
    longest = {row["length"]: max(each["rows"] for each in runs if each["length"] == row["length"]) for row in runs}
    series = (
        ("length", "tokens of a pack", [row for row in runs if row["rows"] == longest[row["length"]]]),
        ("rows", f"packs of {SHORT} tokens", [row for row in runs if row["length"] == SHORT]),
    )
    for place, (axis, label, shown) in enumerate(series):
        for axes, field, unit, title in (
            (panels[2 * place], "tokens a CPU second", 1, "tokens a CPU second"),
            (panels[2 * place + 1], "peak bytes", 1e9, "peak of the process, GB"),
        ):
            for name, color in WHOLE_RUNS.items():
                points = sorted((row[axis], row[field] / unit) for row in shown if row["contender"] == name)
                axes.plot(*zip(*points), marker="o", markersize=3, color=color, label=name)
            values = sorted({row[axis] for row in shown})
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_ylim(bottom=0)
            axes.set_title(title)
            axes.set_xlabel(label)
    panels[0].legend(frameon=False)
    return figure


def _first(rows: dict[str, dict[str, Any]]) -> Any:
    """The instruction set of the first run."""
    return next(iter(rows.values()))["isa"]


def main(arguments: list[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with the figures")
    folder: Path = parser.parse_args(arguments).results
    figure, panels = pyplot.subplots(
        1, 5, figsize=(16, 3.4), width_ratios=[1.4, 1, 1, 1, 1], sharey=True, layout="constrained"
    )
    bars(panels[0], json.loads((folder / "step.json").read_text())["rows"])
    for axis, axes in zip(AXES, panels[1:]):
        curves(axes, axis, json.loads((folder / f"scaling-{axis}.json").read_text())["rows"])
    panels[1].legend(frameon=False)
    figure.savefig(folder / "speed.png", dpi=80)
    found = folder / "end_to_end.json"
    if found.exists():
        whole_runs(pyplot, json.loads(found.read_text())["rows"]).savefig(folder / "end_to_end.png", dpi=80)


if __name__ == "__main__":
    main()
