"""The figures of a report, as plotly has them. What names them comes from a run, and is no markup here."""

import html
import json
from typing import Any

from lightning_lora.formats.curves import SPEED, Curves
from lightning_lora.formats.run_record import Rows
from lightning_lora.model.learned import Update

Figure = dict[str, Any]


def literal(text: str) -> str:
    """A text as plotly shows it, which takes some tags of HTML for markup."""
    return html.escape(text, quote=False)


def learning_curves(curves: Curves, before: dict[str, float]) -> dict[str, Figure]:
    """A figure of the losses, and one of the other metrics but those of speed and of single layers, if there are any.

    What was measured before training stands at step 0.
    """
    started = {name: [(0, before[name]), *points] if name in before else points for name, points in curves.items()}
    shown = {name: points for name, points in started.items() if name not in SPEED and "/" not in name}
    return {
        figure_name: _lines(found, title)
        for figure_name, title, is_loss in (("loss", "loss", True), ("metrics", "other metrics", False))
        if (found := {name: points for name, points in shown.items() if ("loss" in name) == is_loss})
    }


def speed(curves: Curves) -> dict[str, Figure]:
    """Tokens or rows a second, and memory, by step."""
    titles = {"tokens_per_second": "tokens a second", "rows_per_second": "rows a second", "peak_memory_gb": "peak GB"}
    return {name: _lines({name: curves[name]}, title) for name, title in titles.items() if name in curves}


def lengths(data: list[Rows]) -> dict[str, Figure]:
    """How many texts are how long, as a share of their split, so that a small one is seen beside a large one."""
    traces = []
    for rows in data:
        if (found := rows["lengths"]) is not None:
            starts = [found["first"] + index * found["step"] for index in range(len(found["counts"]))]
            traces.append(
                {
                    "type": "bar",
                    "name": literal(rows["purpose"]),
                    "x": [start + (found["step"] - 1) / 2 for start in starts],
                    "y": [count / found["texts"] for count in found["counts"]],
                    "width": found["step"],
                    "opacity": 0.6,
                    "customdata": [
                        [f"{start} to {start + found['step'] - 1}", count]
                        for start, count in zip(starts, found["counts"])
                    ],
                    "hovertemplate": "%{customdata[0]} tokens: %{customdata[1]} texts<extra>%{fullData.name}</extra>",
                }
            )
    layout = {"barmode": "overlay", "xaxis": {"title": "tokens"}, "yaxis": {"title": "texts", "tickformat": ".0%"}}
    return {"lengths": _figure(traces, layout)} if traces else {}


def norms(updates: list[Update]) -> dict[str, Figure]:
    """The norm of each update by layer and module, relative to the weight where that is known of all."""
    if not updates:
        return {}
    relative = all(update.relative_norm is not None for update in updates)
    places = [_place(update.layer) for update in updates]
    columns = sorted({depth for depth, _ in places})
    kinds = list(dict.fromkeys(pattern for _, pattern in places))
    table: list[list[float | None]] = [[None] * len(columns) for _ in kinds]
    numbers: list[list[int | None]] = [[None] * len(columns) for _ in kinds]
    for number, (update, (depth, pattern)) in enumerate(zip(updates, places)):
        row, column = kinds.index(pattern), columns.index(depth)
        table[row][column] = update.relative_norm if relative else update.spectrum.norm
        numbers[row][column] = number
    trace = {
        "type": "heatmap",
        "x": [".".join(map(str, depth)) or "-" for depth in columns],
        "y": [literal(_short(kind, kinds)) for kind in kinds],
        "z": table,
        "customdata": numbers,
        "colorscale": "Viridis",
        "colorbar": {"tickformat": ".1%" if relative else ".2g", "thickness": 12},
        "hovertemplate": "layer %{x}, %{y}: %{z:" + (".2%" if relative else ".3g") + "}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "xaxis": {"title": "layer", "type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
    }
    return {"norms": _figure([trace], layout)}


def spectrum() -> Figure:
    """Bars for the singular values of one layer, which the page fills in."""
    trace = {"type": "bar", "x": [], "y": [], "hovertemplate": "%{x}: %{y:.4g}<extra></extra>"}
    return _figure([trace], {"xaxis": {"title": "component"}, "yaxis": {"title": "singular value"}})


def _lines(curves: Curves, title: str) -> Figure:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) < 30 else "lines",
            "name": literal(name),
            "x": [step for step, _ in points],
            "y": [value for _, value in points],
        }
        for name, points in curves.items()
    ]
    layout = {"xaxis": {"title": "step", "rangemode": "tozero"}, "yaxis": {"title": title}}
    return _figure(traces, layout | {"showlegend": len(traces) > 1})


def _figure(traces: list[dict[str, Any]], layout: dict[str, Any]) -> Figure:
    """A figure that plotly has checked, without its default theme."""
    from plotly.graph_objects import Figure as Checked

    for axis in ("xaxis", "yaxis"):
        layout[axis]["title"] = {"text": layout[axis].get("title", "")}
    found: Figure = json.loads(Checked(traces, {**layout, "template": None}).to_json())
    return found


def _place(layer: str) -> tuple[tuple[int, ...], str]:
    """The numbers in a layer's name, and the name without them."""
    parts = layer.split(".")
    numbers = tuple(int(part[:9]) for part in parts if part.isdecimal())
    return numbers, ".".join("*" if part.isdecimal() else part for part in parts)


def _short(pattern: str, patterns: list[str]) -> str:
    """The end of a name, as long as it must be to tell it from the others."""
    parts = pattern.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in patterns) == 1), pattern)
