"""Time of a training step: ours, PEFT's, full fine-tuning, and the floor that no LoRA can go below.

The floor is the frozen base's forward and its backward to the inputs. All take turns in one process, so that a machine
that drifts drifts for all, and what is reported is the median of their ratios to the floor of the same turn.

    python -m benchmarks.step
    python -m benchmarks.step --optimizer
    python -m benchmarks.step --shape 1B --tokens 4096 --device cuda --dtype bfloat16 --compile
"""

from typing import Any

from torch import nn

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES, TARGETS


def compiled_parts(model: nn.Module, what: str | None) -> list[nn.Module]:
    """The modules to compile each for itself."""
    if what == "blocks":
        return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    return [] if what is None else [model]


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=20)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="model",
        choices=("model", "blocks"),
        help="torch.compile each model, or each of its blocks, which takes less time to compile",
    )
    parser.add_argument("--without-full", action="store_true", help="leave full fine-tuning out, for want of memory")
    parser.add_argument("--optimizer", action="store_true", help="with a step of AdamW, for all but the floor")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    models = harness.contenders(shape, args.r, args.targets, args.device, DTYPES[args.dtype], not args.without_full)
    for model in models.values():
        for part in compiled_parts(model, args.compile):
            part.compile()
    steps = {
        name: harness.stepper(model, shape, args.tokens, harness.still_adamw(model) if args.optimizer else None)
        for name, model in models.items()
    }
    times = harness.take_turns(steps, args.turns, args.device)
    rows: dict[str, dict[str, Any]] = harness.ratios(times, to="floor")  # type: ignore[assignment]
    for name, of_full in (harness.ratios(times, to="full") if "full" in times else {}).items():
        rows[name]["of full"] = of_full
    harness.report(
        harness.variant(
            "step", optimizer=args.optimizer, compile=args.compile is not None, **{args.dtype: args.dtype != "float32"}
        ),
        args,
        rows,
        ("over the floor (quartiles)", "of full (quartiles)", "seconds"),
        lambda row: (
            harness.spread(row, 3),
            harness.spread(row["of full"]) if "of full" in row else "",
            f"{row['seconds']:.4f}",
        ),
    )


if __name__ == "__main__":
    main()
