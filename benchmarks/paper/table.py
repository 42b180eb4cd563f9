"""The figures as Markdown."""

import statistics
from typing import Any

from benchmarks.paper.contenders import RANKS, TASKS
from benchmarks.paper.results import chosen_rate

Row = dict[str, Any]
COLUMNS = ("trained", "checkpoint", "optimizer", "peak memory", "step", "forward, unmerged", "merged")


def markdown(task: str, runs: list[Row], timings: list[Row]) -> str:
    """The table of a task: means over the seeds, the quality with its largest distance from the mean."""
    lines = [f"| {task} | {TASKS[task].metric} | learning rate | {' | '.join(COLUMNS)} |", "|---" * 10 + "|"]
    for name in _in_order(task):
        found = [run for run in runs if run["task"] == task and run["contender"] == name and not run["search"]]
        time = next((row for row in timings[::-1] if (row["task"], row["contender"]) == (task, name)), None)
        if found:
            cells = [_title(task, name), *_quality(task, name, found, runs), *_cells(found, time)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_order(task: str) -> list[str]:
    lora = [f"{kind}-{rank}" for kind in TASKS[task].targets for rank in sorted(RANKS)]
    return ["full", *TASKS[task].trained, *lora]


def _title(task: str, name: str) -> str:
    kind, _, rank = name.partition("-")
    if not rank:
        return {"full": "full fine-tuning", "head": "head alone", "prefix": "prefix tuning"}[kind]
    targets = TASKS[task].targets[kind]
    return f"LoRA, r={rank}, {'every linear layer' if isinstance(targets, str) else ', '.join(targets)}"


def _quality(task: str, name: str, found: list[Row], runs: list[Row]) -> list[str]:
    scores = [run["quality"] for run in found]
    mean = statistics.mean(scores)
    spread = f" ± {max(abs(score - mean) for score in scores):.3f}" if len(scores) > 1 else ""
    seeds = f" ({len(scores)} of 3 seeds)" if len(scores) < 3 else ""
    return [f"{mean:.3f}{spread}{seeds}", f"{chosen_rate(task, name, runs):g}"]


def _cells(found: list[Row], time: Row | None) -> list[str]:
    def mean(field: str) -> float:
        return statistics.mean(run[field] for run in found)

    cells = [f"{mean('trained'):,.0f}", _size(mean("checkpoint_bytes")), _size(mean("optimizer_bytes"))]
    cells.append(f"{mean('peak_bytes') / 1e9:.2f} GB")
    ratios = [time and time[field] for field in ("step", "unmerged", "merged")]
    return [*cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]


def _size(count: float) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.0f} kB"
