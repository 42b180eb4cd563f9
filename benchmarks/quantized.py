"""A training step with AdamW on a quantized base: bytes, time and loss, ours beside PEFT's on the same base.

Each kind of bitsandbytes has a floor, the quantized base alone: its forward and its backward to the inputs. float32 is
the base as it was, and bfloat16 the same after LoRA(base_dtype="bfloat16"), with adapters in float32. All take turns.
Bytes are those of tensors, counted as in benchmarks.memory, with the scales of quantized weights. The loss is that on
the one batch after all of these steps.

    python -m benchmarks.quantized
    python -m benchmarks.quantized --kinds float32 bfloat16 --mixed
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks import harness
from benchmarks.harness import SHAPES, TARGETS
from lightning_lora.model.base_dtype import cast_base
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.pretrained import QUANTIZE, quantization_config


def resting_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """The bytes of weights, buffers and moments between steps."""
    packed: dict[int, int] = {}
    for _, module, storage, found in quantized_layers(model):
        first, *others = storage.tensors(found)
        packed |= {id(first): storage.size(module, found), **{id(other): 0 for other in others}}
    moments = [value for state in (optimizer.state.values() if optimizer else ()) for value in state.values()]
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *moments)}
    return sum(packed.get(key, tensor.numel() * tensor.element_size()) for key, tensor in tensors.items())


def contenders(shape: harness.Shape, kind: str, r: int, targets: str, device: str) -> dict[str, nn.Module]:
    """The floor, ours and PEFT on a base of a kind, each with its own, which is the same."""

    def base() -> nn.Module:
        if kind in harness.DTYPES:
            return harness.base(shape, device).to(harness.DTYPES[kind])
        config = quantization_config(kind, torch.float32)
        found: nn.Module = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device)
        return found.train()

    with tempfile.TemporaryDirectory() as folder:
        if kind not in harness.DTYPES:
            harness.base(shape, device).save_pretrained(folder)
        models = {
            "floor": base().requires_grad_(False),
            "ours": _cast(harness.ours(harness.base(shape, device), r, targets), kind)
            if kind in harness.DTYPES
            else harness.ours(base(), r, targets),
            "PEFT": harness.theirs(base(), r, targets),
        }
    for model in models.values():
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # which would round PEFT's base in its first evaluation
    return models


def _cast(model: nn.Module, kind: str) -> nn.Module:
    cast_base(model, harness.DTYPES[kind], is_mixed=True)
    return model


def mixed(step: Callable[[], None], device: str) -> Callable[[], None]:
    """A step under bfloat16 autocast."""

    def under_autocast() -> None:
        with torch.autocast(device, torch.bfloat16):
            step()

    return under_autocast


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=10)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=256, help="a step")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    kinds = ("float32", "bfloat16", *QUANTIZE)
    parser.add_argument("--kinds", choices=kinds, nargs="+", default=["float32", "nf4-dq", "int8"])
    parser.add_argument("--mixed", action="store_true", help="under bfloat16 autocast, as bf16-mixed is")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    models, optimizers, steps = {}, {}, {}
    for kind in args.kinds:
        for name, model in contenders(shape, kind, args.r, args.targets, args.device).items():
            key = f"{kind}: {name}"
            models[key], optimizers[key] = model, _adamw(model)
            torch.manual_seed(1)  # the same batch for all
            step = harness.stepper(model, shape, args.tokens, optimizers[key])
            steps[key] = mixed(step, args.device) if args.mixed else step
    taken = harness.take_turns(steps, args.turns, args.device)
    beside = {name: times["median"] for name, times in harness.ratios(taken, to=f"{args.kinds[0]}: ours").items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        resting = resting_bytes(model, optimizers[name])
        rows[name] = {
            **harness.ratios(taken, to=f"{name.partition(':')[0]}: floor")[name],
            "beside ours on the first": beside[name],
            "resting bytes": resting,
            "peak bytes": resting + harness.peak_bytes(steps[name], args.device),
            "loss": _loss(model, shape, args.tokens),
        }
    harness.report(
        harness.variant("quantized", mixed=args.mixed),
        args,
        rows,
        ("over the floor (quartiles)", f"over ours, {args.kinds[0]}", "seconds", "at rest", "peak", "loss"),
        lambda row: (
            harness.spread(row, 3),
            f"{row['beside ours on the first']:.2f}",
            f"{row['seconds']:.4f}",
            f"{row['resting bytes'] / 1e6:.1f} MB",
            f"{row['peak bytes'] / 1e6:.1f} MB",
            f"{row['loss']:.4f}",
        ),
    )


def _adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3) if trained else None


@torch.no_grad()
def _loss(model: nn.Module, shape: harness.Shape, tokens: int) -> float:
    torch.manual_seed(1)
    embeddings, labels = harness.batch(model, shape, tokens)
    return float(model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss)


if __name__ == "__main__":
    main()
