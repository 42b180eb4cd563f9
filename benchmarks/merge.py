"""Folding an adapter in, over a plain copy of the weights that it folds into: ours and PEFT's.

The copy is what the machine's memory allows, since a merge reads each adapted weight and writes one of its size. Ours
keeps the weights that were there, to bring them back bit for bit; PEFT's changes them in place.

Three parts of ours are measured by themselves: the weights to float32 and back, by blocks, with no update; the product
of A and B, into one block; and the checksum by which it is known later whether merged weights were changed.

    python -m benchmarks.merge
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES
from lightning_lora import merge, unmerge
from lightning_lora.layers.folding import folded_by_rows
from lightning_lora.layers.seal import checksum


def trained(model: nn.Module) -> nn.Module:
    """The model with an adapter that is not zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def converted(weights: Sequence[Tensor]) -> None:
    """Each weight to float32 and back."""
    for weight in weights:
        folded_by_rows(weight, [])


@torch.no_grad()
def multiplied(layers: Sequence[Any]) -> None:
    """The update of each layer's weight, added to the first numbers of one buffer."""
    buffer = torch.zeros(max(layer.weight.numel() for layer in layers), device=layers[0].weight.device)
    for layer in layers:
        adapter = layer.lora["default"]
        block = buffer[: layer.weight.numel()].view(layer.weight.shape)
        block.addmm_(adapter.lora_B, adapter.lora_A, alpha=adapter.scaling)


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=15)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    rows: dict[str, dict[str, Any]] = {}
    for dtype in args.dtype:
        own = trained(harness.ours(harness.base(shape, args.device, DTYPES[dtype]), args.r, "all"))
        other: Any = trained(harness.theirs(harness.base(shape, args.device, DTYPES[dtype]), args.r, "all"))
        layers: list[Any] = [module for module in own.modules() if hasattr(module, "lora")]
        weights = [layer.weight for layer in layers]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "copy": (lambda weights=weights: [weight.clone() for weight in weights], lambda: None),
            "ours": (lambda own=own: merge(own), lambda own=own: unmerge(own)),
            "ours, to float32 and back": (lambda weights=weights: converted(weights), lambda: None),
            "ours, product": (lambda layers=layers: multiplied(layers), lambda: None),
            "ours, checksum": (lambda weights=weights: [checksum(weight) for weight in weights], lambda: None),
            "PEFT": (other.merge_adapter, other.unmerge_adapter),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(args.turns + 2):
            for name, (call, undo) in calls.items():
                taken = harness.seconds(call, args.device)
                undo()
                if turn >= 2:
                    times[name].append(taken)
        for name, row in harness.ratios(times, to="copy").items():
            call, undo = calls[name]
            rows[f"{dtype}: {name}"] = {
                **row,
                "bytes a second": 2 * size / row["seconds"],
                "peak over weights": harness.peak_bytes(call, args.device) / size,
            }
            undo()
    harness.report(
        "merge",
        args,
        rows,
        ("over a copy (quartiles)", "milliseconds", "read and written", "memory over the weights"),
        lambda row: (
            harness.spread(row),
            f"{1e3 * row['seconds']:.1f}",
            f"{row['bytes a second'] / 1e9:.1f} GB/s",
            f"{row['peak over weights']:.2f}",
        ),
    )


if __name__ == "__main__":
    main()
