"""Models with quantized linear layers, of every kind that their packages make on a CPU."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn


def bitsandbytes_4bit(layer: nn.Linear, **settings: Any) -> nn.Module:
    import bitsandbytes

    new = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype, **settings
    )
    new.support_avx512bf16_for_cpu = False  # no test depends on the processor
    return _filled(new, layer)


def bitsandbytes_8bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    bias = layer.bias is not None
    return _filled(
        bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False), layer
    )


def _filled(new: nn.Module, layer: nn.Linear) -> nn.Module:
    new.load_state_dict(layer.state_dict(), strict=False)
    return new.to(layer.weight.dtype).to("cpu")  # which quantizes


def torchao(layer: nn.Linear, config: str, *arguments: Any) -> nn.Module:
    import torchao.quantization

    torchao.quantization.quantize_(layer, getattr(torchao.quantization, config)(*arguments))
    return layer


def torchao_nf4(layer: nn.Linear) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    layer.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 1), requires_grad=False)
    return layer


QUANTIZERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": partial(bitsandbytes_4bit, quant_type="nf4", compress_statistics=False),
    "nf4-dq": partial(bitsandbytes_4bit, quant_type="nf4", compress_statistics=True),
    "fp4": partial(bitsandbytes_4bit, quant_type="fp4", compress_statistics=False),
    "nf4 in bfloat16": partial(
        bitsandbytes_4bit, quant_type="nf4", compress_statistics=False, quant_storage=torch.bfloat16
    ),
    "nf4 in float32": partial(
        bitsandbytes_4bit, quant_type="nf4", compress_statistics=False, quant_storage=torch.float32
    ),
    "int8": bitsandbytes_8bit,
    "torchao int8": partial(torchao, config="Int8WeightOnlyConfig"),
    "torchao int4": lambda layer: torchao(layer, "IntxWeightOnlyConfig", torch.int4),
    "torchao float8": partial(torchao, config="Float8WeightOnlyConfig"),
    "torchao nf4": torchao_nf4,
}
NEEDS = {name: "torchao" if name.startswith("torchao") else "bitsandbytes" for name in QUANTIZERS}


def kinds(*names: str) -> Any:
    """A mark for tests that take the name of a kind, skipped where its package is not installed."""
    each = [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(NEEDS[name]) is None, reason=f"{NEEDS[name]} is not installed"
            ),
        )
        for name in names or QUANTIZERS
    ]
    return pytest.mark.parametrize("kind", each)


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def quantize(model: nn.Module, kind: str, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Quantize the linear layers of a model in place; where it is one itself, what is returned is quantized."""
    if isinstance(model, nn.Linear):
        return QUANTIZERS[kind](model)
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and f"{parent_name}.{name}".strip(".") not in skip:
                setattr(parent, name, QUANTIZERS[kind](layer))
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Put ordinary linear layers with the dequantized weights in the place of the quantized ones."""
    from lightning_lora.layers import dequantized, storage_of

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if storage_of(layer) is not None:
                weight = dequantized(layer)
                plain = nn.Linear(*weight.shape[::-1], bias=layer.bias is not None)
                plain.weight = nn.Parameter(weight)
                plain.bias = layer.bias
                setattr(parent, name, plain)
    return model


def train(model: nn.Module, seed: int = 1, size: float = 0.05) -> None:
    """Move the adapters of a model away from their start, the same way each time."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora." in f".{name}":
            with torch.no_grad():
                parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
