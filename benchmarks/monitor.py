"""What ``AdapterMonitor`` costs: a look at the adapters, over a training step with AdamW.

At its default, it looks once in 50 steps.

    python -m benchmarks.monitor
    python -m benchmarks.monitor --shape 1B --tokens 4096 --device cuda --dtype bfloat16
"""

from typing import Any

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES, TARGETS
from lightning_lora.callbacks import AdapterMonitor
from lightning_lora.model.learned import learners


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=20)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    model = harness.ours(harness.base(shape, args.device, DTYPES[args.dtype]), args.r, args.targets)
    monitor = AdapterMonitor()
    monitor._learners = learners(model)  # as when training starts
    gradients = {parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad}

    def look() -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        monitor._figures()
        monitor._gradient_norms(sharded=False)
        for parameter in gradients:
            parameter.grad = None

    calls = {"step": harness.stepper(model, shape, args.tokens, harness.still_adamw(model)), "look": look}
    rows: dict[str, dict[str, Any]] = harness.ratios(harness.take_turns(calls, args.turns, args.device), to="step")  # type: ignore[assignment]
    harness.report(
        "monitor",
        args,
        rows,
        ("milliseconds", "over a step (quartiles)", "each step, at one look in 50"),
        lambda row: (
            f"{1e3 * row['seconds']:.1f}",
            harness.spread(row, 3),
            f"{row['median'] / monitor.every_n_steps:.2%}",
        ),
    )


if __name__ == "__main__":
    main()
