"""Seconds to put adapters in: ours and PEFT's, on the meta device and on real weights.

Beside them stands one pass over the real weights, which neither needs.

    python -m benchmarks.inject
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import SHAPES


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=7)
    parser.add_argument("--meta", choices=SHAPES, default="7B", help="the shape without weights")
    parser.add_argument("--shape", choices=SHAPES, default="135M", help="the one with weights")
    parser.add_argument("--r", type=int, default=8)
    args = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    for shape, device in ((args.meta, "meta"), (args.shape, "cpu")):
        # The weights are there once; a contender is put into a model anew in each turn.
        first = harness.base(SHAPES[shape], device)

        def fresh(shape: str = shape, first: torch.nn.Module = first) -> torch.nn.Module:
            model = harness.base(SHAPES[shape], "meta")
            model.load_state_dict(first.state_dict(), assign=True)
            return model

        calls: dict[str, Callable[[torch.nn.Module], Any]] = {
            "ours": lambda model: harness.ours(model, args.r, "all"),
            "PEFT": lambda model: harness.theirs(model, args.r, "all"),
        }
        if device != "meta":
            calls["one pass over the weights"] = lambda model: [parameter.sum() for parameter in model.parameters()]
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(args.turns + 1):
            for name, call in calls.items():
                model = fresh()
                taken = harness.seconds(lambda call=call, model=model: call(model))
                if turn:
                    times[name].append(taken)
        for name, row in harness.ratios(times, to="ours").items():
            rows[f"{shape}, {device}: {name}"] = row
    harness.report(
        "inject",
        args,
        rows,
        ("seconds", "over ours (quartiles)"),
        lambda row: (f"{row['seconds']:.3f}", harness.spread(row)),
    )


if __name__ == "__main__":
    main()
