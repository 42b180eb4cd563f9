"""The figures of the runs, put together: medians over the turns, and ratios of the same turn."""

import statistics
from typing import Any

Row = dict[str, Any]
SAME = ("task", "length", "rows", "dropout", "isa")


def summary(runs: list[Row]) -> dict[str, Row]:
    """For each setting and contender its figures, and ours beside it."""
    found: dict[str, Row] = {}
    for run in runs:
        own = [each for each in runs if _key(each) == _key(run) and each["contender"] == run["contender"]]
        pairs = [(mine, each) for each in own for mine in runs if _same_turn(mine, each)]
        found.setdefault(
            _name(run),
            {
                **{field: run[field] for field in ("contender", *SAME)},
                "turns": len(own),
                "tokens a CPU second": statistics.median(_speed(each) for each in own),
                "tokens a second": statistics.median(each["tokens"] / each["seconds"] for each in own),
                "peak bytes": statistics.median(each["peak_bytes"] for each in own),
                "bytes beyond rest": statistics.median(each["peak_bytes"] - each["resting_bytes"] for each in own),
                "trained": run["trained"],
                **_beside_ours(pairs),
            },
        )
    return found


def _beside_ours(pairs: list[tuple[Row, Row]]) -> Row:
    if not pairs:
        return {}
    return {
        "ours over it": _spread([_speed(mine) / _speed(each) for mine, each in pairs]),
        "ours of its peak": statistics.median(mine["peak_bytes"] / each["peak_bytes"] for mine, each in pairs),
        "ours of it beyond rest": statistics.median(
            (mine["peak_bytes"] - mine["resting_bytes"]) / (each["peak_bytes"] - each["resting_bytes"])
            for mine, each in pairs
        ),
        "difference of losses": max(
            abs(one - other) for mine, each in pairs for one, other in zip(mine["losses"], each["losses"])
        ),
    }


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    speed, peak = f"{row['tokens a CPU second']:.1f}", f"{row['peak bytes'] / 1e9:.2f}"
    beyond = f"{row['bytes beyond rest'] / 1e9:.2f}"
    if "ours over it" not in row:
        return speed, "", peak, beyond, "", ""
    ratio = row["ours over it"]
    return (
        speed,
        f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})",
        peak,
        beyond,
        f"{row['ours of its peak']:.2f}, {row['ours of it beyond rest']:.2f}",
        f"{row['difference of losses']:.1e}",
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _speed(run: Row) -> float:
    return float(run["tokens"] / run["cpu_seconds"])


def _key(run: Row) -> tuple[Any, ...]:
    return tuple(run[field] for field in SAME)


def _same_turn(mine: Row, run: Row) -> bool:
    same = _key(mine) == _key(run) and mine["steps"] == run["steps"]
    return same and (mine["contender"], mine["turn"]) == ("ours", run["turn"])


def _name(run: Row) -> str:
    dropout = f", dropout {run['dropout']}" if run["dropout"] else ""
    return f"{run['isa']}, {run['task']}, {run['rows']} x {run['length']}{dropout}: {run['contender']}"
