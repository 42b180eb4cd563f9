"""The step's time over the floor as rank, hidden size, layers or tokens grow from the same middle.

Each axis writes a file of its own.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --axis tokens
"""

import argparse
import dataclasses
from typing import Any

from benchmarks import harness

MIDDLE = {"rank": 8, "hidden": 512, "layers": 4, "tokens": 512}
AXES = {
    "rank": [1, 8, 32, 128],
    "hidden": [256, 512, 1024],
    "layers": [2, 4, 8],
    "tokens": [128, 512, 2048],
}


def measure(point: dict[str, int], turns: int) -> dict[str, Any]:
    """Ratios of all contenders at one point."""
    shape = dataclasses.replace(
        harness.SHAPES["small"],
        hidden=point["hidden"],
        intermediate=point["hidden"] * 11 // 4,
        layers=point["layers"],
        heads=point["hidden"] // 64,
        kv_heads=point["hidden"] // 64,
    )
    models = harness.contenders(shape, point["rank"], ["all"])
    steps = {name: harness.stepper(model, shape, point["tokens"]) for name, model in models.items()}
    return {**harness.ratios(harness.take_turns(steps, turns), to="floor")}


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=8)
    parser.add_argument("--axis", choices=AXES, nargs="+", default=list(AXES))
    parser.add_argument("--values", type=int, nargs="+", help="instead of the usual ones")
    args = parser.parse_args(arguments)
    for axis in args.axis:
        values = args.values or AXES[axis]
        rows = {str(value): measure(MIDDLE | {axis: value}, args.turns) for value in values}
        harness.report(
            f"scaling-{axis}",
            argparse.Namespace(**MIDDLE | {axis: values}, turns=args.turns, json=args.json),
            rows,
            ("ours", "PEFT", "full"),
            lambda row: [harness.spread(row[name], 3) for name in ("ours, all", "PEFT, all", "full")],
        )


if __name__ == "__main__":
    main()
