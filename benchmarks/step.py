"""Time of a training step: ours, PEFT's, full fine-tuning, and the floor that no LoRA can go below.

The floor is the frozen base's forward and its backward to the inputs. All take turns in one process, so that a machine
that drifts drifts for all, and what is reported is the median of their ratios to the floor of the same turn.

    python -m benchmarks.step
    python -m benchmarks.step --optimizer
    python -m benchmarks.step --shape 1B --tokens 4096 --device cuda --dtype bfloat16 --compile
"""

import torch

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES, TARGETS


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=20)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    parser.add_argument("--optimizer", action="store_true", help="with a step of AdamW, for all but the floor")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    models = harness.contenders(shape, args.r, args.targets, args.device, DTYPES[args.dtype])
    if args.compile:
        models = {name: torch.compile(model) for name, model in models.items()}  # type: ignore[misc]
    steps = {
        name: harness.stepper(model, shape, args.tokens, harness.still_adamw(model) if args.optimizer else None)
        for name, model in models.items()
    }
    times = harness.take_turns(steps, args.turns, args.device)
    of_full = harness.ratios(times, to="full")
    rows = {name: {**row, "of full": of_full[name]} for name, row in harness.ratios(times, to="floor").items()}
    harness.report(
        harness.variant(
            "step", optimizer=args.optimizer, compile=args.compile, **{args.dtype: args.dtype != "float32"}
        ),
        args,
        rows,
        ("over the floor (quartiles)", "of full (quartiles)", "seconds"),
        lambda row: (harness.spread(row, 3), harness.spread(row["of full"]), f"{row['seconds']:.4f}"),
    )


if __name__ == "__main__":
    main()
