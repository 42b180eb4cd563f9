"""Time of a forward pass over the base's, ours and PEFT's.

Once with the adapter folded in, once with it beside the weights.

    python -m benchmarks.inference
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import SHAPES
from lightning_lora import merge


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=40)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--r", type=int, default=8)
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    models = {
        "base": harness.base(shape),
        "ours, merged": merge(harness.ours(harness.base(shape), args.r, "all")),
        "PEFT, merged": harness.theirs(harness.base(shape), args.r, "all").merge_and_unload(),  # type: ignore[operator]
        "ours, beside": harness.ours(harness.base(shape), args.r, "all"),
        "PEFT, beside": harness.theirs(harness.base(shape), args.r, "all"),
    }
    tokens = torch.randint(0, shape.vocabulary, (1, args.tokens))

    def forward(model: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=tokens, use_cache=False)

    calls = {name: forward(model.eval()) for name, model in models.items()}
    with torch.no_grad():
        rows = harness.ratios(harness.take_turns(calls, args.turns), to="base")
    harness.report(
        "inference",
        args,
        rows,
        ("over the base (quartiles)", "milliseconds"),
        lambda row: (harness.spread(row, 3), f"{1e3 * row['seconds']:.1f}"),
    )


if __name__ == "__main__":
    main()
