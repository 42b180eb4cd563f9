"""Peak memory of a training step with AdamW: ours, PEFT's, full fine-tuning, and the floor.

The floor is the frozen base's forward and its backward to the inputs, without an optimizer. Counted are the bytes of
tensors: weights, gradients, moments, and what the step allocates (on the CPU each allocation, by the profiler; on a GPU
by its own statistics). The figures are exact, so they have no spread. The last column is the peak of a forward pass of
the first q_proj alone, in sizes of its output: 1 is the output and nothing beside it.

    python -m benchmarks.memory
"""

from typing import Any

import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES, TARGETS


def measure(model: nn.Module, shape: harness.Shape, tokens: int, device: str) -> dict[str, float]:
    """Bytes that lie there between steps, and at the peak of a step."""
    optimizer = harness.still_adamw(model)
    step = harness.stepper(model, shape, tokens, optimizer)
    step()
    moments = [value for state in (optimizer.state.values() if optimizer else ()) for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *moments]
    resting = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    x = torch.randn(tokens, shape.hidden).to(layer.weight)
    outputs = layer(x)
    return {
        "resting bytes": resting,
        "peak bytes": resting + harness.peak_bytes(step, device),
        "layer peak": harness.peak_bytes(lambda: layer(x), device) / (outputs.numel() * outputs.element_size()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 32], help="a step; few: the weights dominate")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    parser.add_argument("--without-full", action="store_true", help="leave full fine-tuning out, for want of memory")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    models = harness.contenders(shape, args.r, args.targets, args.device, DTYPES[args.dtype], not args.without_full)
    rows: dict[str, dict[str, Any]] = {}
    for tokens in args.tokens:
        found = {name: measure(model, shape, tokens, args.device) for name, model in models.items()}
        for name, row in found.items():
            row["over floor"] = row["peak bytes"] / found["floor"]["peak bytes"]
            if "full" in found:
                row["of full"] = row["peak bytes"] / found["full"]["peak bytes"]
            rows[f"{tokens} tokens: {name}"] = row
    harness.report(
        harness.variant("memory", **{args.dtype: args.dtype != "float32"}),
        args,
        rows,
        ("at rest", "peak", "over the floor", "of full", "a layer"),
        lambda row: (
            f"{row['resting bytes'] / 1e6:.1f} MB",
            f"{row['peak bytes'] / 1e6:.1f} MB",
            f"{row['over floor']:.3f}",
            f"{row['of full']:.2f}" if "of full" in row else "",
            f"{row['layer peak']:.2f}",
        ),
    )


if __name__ == "__main__":
    main()
