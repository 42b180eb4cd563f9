"""Draw ``benchmarks/results/speed.png`` from the figures that ``step`` and ``scaling`` wrote.

It needs matplotlib, which comes with the ``plot`` extra.

    python -m benchmarks.chart
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

COLORS = {"ours": "tab:blue", "PEFT": "tab:orange", "full": "tab:gray"}
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


if __name__ == "__main__":
    main()
