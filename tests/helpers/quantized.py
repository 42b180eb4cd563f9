"""Models with quantized linear layers, of every kind that their packages make on a CPU."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from lightning_lora.layers import Packed, QuantizedStorage, register_quantized_storage


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


def hqq(layer: nn.Linear, **settings: Any) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    dtype = layer.weight.dtype
    return HQQLinear(layer, BaseQuantizeConfig(**settings), compute_dtype=dtype, device="cpu")


class RowLinear(nn.Module):
    """A layer of no library, with codes, zeros and scales in buffers, one of them in no state dict."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", layer.bias)
        codes, zeros, scales = self.quantized(layer.weight.detach())
        self.register_buffer("qweight", codes)
        self.register_buffer("qzeros", zeros)
        self.register_buffer("scales", scales, persistent=False)

    @staticmethod
    def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-6) / 7
        return (weight / scales).round().to(torch.int32) + 8, torch.full_like(scales, 8, dtype=torch.int32), scales

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}rows"] = torch.tensor(len(self.qweight))  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        assert len(self.qweight) == state_dict.pop(f"{prefix}rows")  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = (self.qweight - self.qzeros) * self.scales
        return nn.functional.linear(x, weight, self.bias)


class Rows(QuantizedStorage):
    """What reads it."""

    supported = "RowLinear"
    parts = ("qweight", "qzeros", "scales")

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, RowLinear)

    def shape(self, module: nn.Module, packed: Packed) -> torch.Size:
        return packed["qweight"].shape  # type: ignore[no-any-return]

    def dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        return packed["scales"].dtype  # type: ignore[no-any-return]

    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        return ((packed["qweight"] - packed["qzeros"]) * packed["scales"]).float()  # type: ignore[no-any-return]

    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        values = RowLinear.quantized(weight)
        return {name: nn.Buffer(value, persistent=name != "scales") for name, value in zip(self.parts, values)}

    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        return {"library": "none", "bits": 4}

    def size(self, module: nn.Module, packed: Packed) -> int:
        return sum(tensor.nbytes for tensor in self.tensors(packed))

    def plain_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        return nn.Linear


register_quantized_storage(Rows())
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
    "hqq 4": partial(hqq, nbits=4, group_size=16),
    "hqq 3": partial(hqq, nbits=3, group_size=16, axis=0),
    "hqq 8 in float": partial(hqq, nbits=8, group_size=None, view_as_float=True),
    "buffers": RowLinear,
}
_SKIPPED = "{} is not installed, or this version of transformers gives its layers an empty weight"
_PACKAGES = {"torchao": "torchao", "hqq": "hqq", "buffers": "torch"}
NEEDS = {name: _PACKAGES.get(name.split()[0], "bitsandbytes") for name in QUANTIZERS}


def _is_at_hand(package: str) -> bool:
    is_patched = package == "hqq" and Version(transformers.__version__) < Version("5.22")
    return importlib.util.find_spec(package) is not None and not is_patched


def kinds(*names: str) -> Any:
    """A mark for tests that take the name of a kind, skipped where its package is not installed."""
    each = [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not _is_at_hand(NEEDS[name]), reason=_SKIPPED.format(NEEDS[name])),
        )
        for name in names or QUANTIZERS
    ]
    return pytest.mark.parametrize("kind", each)


def needs(package: str) -> Any:
    return pytest.mark.skipif(not _is_at_hand(package), reason=_SKIPPED.format(package))


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
                plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
                setattr(parent, name, plain)
    return model


def train(model: nn.Module, seed: int = 1, size: float = 0.05) -> None:
    """Move the adapters of a model away from their start, the same way each time."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora." in f".{name}":
            with torch.no_grad():
                parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
