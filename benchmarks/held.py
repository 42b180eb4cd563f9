"""What a run holds between steps, beside what ``benchmarks.arithmetic`` predicts of it: weights, gradients, moments.

Counted are the tensors themselves, and on a GPU also what its allocator has given out, with the peak of a step.

    python -m benchmarks.held
    python -m benchmarks.held --shape 8B --device cuda --dtype bfloat16
"""

from typing import Any

import torch

from benchmarks import harness
from benchmarks.arithmetic import lora_run
from benchmarks.harness import DTYPES, SHAPES
from lightning_lora import LoraConfig, inject


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=512, help="a step")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the base")
    args = parser.parse_args(arguments)
    shape, dtype = SHAPES[args.shape], DTYPES[args.dtype]
    predicted = lora_run(harness.base(shape, "meta"), args.r, frozen_bytes=dtype.itemsize).memory(1)
    on_gpu = args.device != "cpu"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = inject(harness.base(shape, args.device, dtype), LoraConfig(r=args.r))
    optimizer = harness.still_adamw(model)
    assert optimizer is not None
    embeddings, labels = harness.batch(model, shape, args.tokens)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()
        optimizer.step()

    step()
    peak = harness.peak_bytes(step, args.device)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *gradients, *moments))
    row: dict[str, Any] = {"predicted bytes": predicted, "held bytes": held, "peak bytes": held + peak}
    if on_gpu:
        row["allocated bytes"] = torch.cuda.memory_allocated() - before
    harness.report(
        "held",
        args,
        {"ours": row},
        ("predicted", "held", "over the prediction", "allocated", "peak of a step"),
        lambda row: (
            f"{row['predicted bytes'] / 1e6:,.2f} MB",
            f"{row['held bytes'] / 1e6:,.2f} MB",
            f"{row['held bytes'] / row['predicted bytes']:.4f}",
            f"{row['allocated bytes'] / 1e6:,.2f} MB" if "allocated bytes" in row else "",
            f"{row['peak bytes'] / 1e6:,.2f} MB",
        ),
    )


if __name__ == "__main__":
    main()
