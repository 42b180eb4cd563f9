"""Weights in 4 and 8 bits of bitsandbytes (Dettmers et al., arXiv 2305.14314 and 2208.07339)."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear  # by its own name, for Lightning's BitsandbytesPrecision has nn.Linear be another class

from lightning_lora.class_names import is_a
from lightning_lora.layers.quantized.storage import PLAIN, Packed, QuantizedStorage

_PACKAGES = ("bitsandbytes.", "lightning.fabric.plugins.precision.bitsandbytes")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class _Bitsandbytes(QuantizedStorage):
    layer: str  # name of the library's class

    def holds(self, module: nn.Module) -> bool:
        return is_a(module, self.layer, _PACKAGES[0])

    def plain_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        return Linear

    def strip(self, module: nn.Module) -> dict[str, Any]:
        taken, attributes = super().strip(module), vars(module)
        # They would read what is loaded as packed bits, or quantize it.
        for name in _HOOKS:
            taken[name] = attributes[name]
            attributes[name] = OrderedDict((key, h) for key, h in taken[name].items() if not _is_from_library(h))
        return taken


def _is_from_library(hook: Any) -> bool:
    while (inner := getattr(hook, "hook", getattr(hook, "func", None))) is not None:
        hook = inner
    return str(getattr(hook, "__module__", "")).startswith(_PACKAGES)


class Bitsandbytes4bit(_Bitsandbytes):
    """``Linear4bit``: blocks of 4-bit codes, NormalFloat or float, with a scale each, which may be quantized too."""

    supported = "bitsandbytes.nn.Linear4bit"
    layer = "Linear4bit"
    attributes = (
        "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "source_cls",
        "support_avx512bf16_for_cpu",
    )  # fmt: skip

    def shape(self, module: nn.Module, packed: Packed) -> torch.Size:
        return torch.Size(_state(module, packed).shape)

    def dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        dtype: torch.dtype = _state(module, packed).dtype
        return dtype

    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        import bitsandbytes

        library: Any = bitsandbytes
        state = copy.copy(_state(module, packed))
        state.dtype = torch.float32
        values: Tensor = library.functional.dequantize_4bit(self.codes(packed).detach(), state)
        return values

    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        import bitsandbytes

        library: Any = bitsandbytes
        state, codes = _state(module, packed), self.codes(packed)
        new: nn.Parameter = library.nn.Params4bit(
            weight.cpu(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=codes.dtype,
        ).to(codes.device)
        _state(module, {PLAIN: new}).dtype = state.dtype
        return {PLAIN: new}

    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        state = _state(module, packed)
        return {
            "library": "bitsandbytes",
            "bits": 4,
            "quant_type": state.quant_type,
            "block_size": state.blocksize,
            "double_quant": bool(state.nested),
        }

    def size(self, module: nn.Module, packed: Packed) -> int:
        state = _state(module, packed)
        scales = (state.absmax, state.code, *((state.state2.absmax, state.state2.code) if state.nested else ()))
        return sum(tensor.nbytes for tensor in (self.codes(packed), *scales))

    def is_ready(self, module: nn.Module, packed: Packed) -> bool:
        return _state(module, packed) is not None

    def cast_with(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        codes = self.codes(packed)
        return codes.dtype if codes.is_floating_point() else None

    def unshardable_reason(self, packed: Packed, flat: bool) -> str | None:
        codes = self.codes(packed)
        if codes.is_floating_point() or not flat:
            return None
        return (
            f"its bits are kept in {codes.dtype}, of which FSDP makes no flat parameters: quantize it with "
            "bnb_4bit_quant_storage in the type of the model's other weights, or use ModelParallelStrategy"
        )

    def refusal(self, module: nn.Module, packed: Packed) -> str | None:
        if getattr(_state(module, packed), "packing_format_for_cpu", False):
            return (
                "bitsandbytes has packed its weight anew for inference on this processor, which rounds the scales: "
                "load the model again, and put the adapter in before the first evaluation"
            )
        return None

    def swap(self, module: nn.Module, other: Packed) -> Packed:
        before = super().swap(module, other)
        if hasattr(other[PLAIN], "quant_state"):
            module.quant_state = other[PLAIN].quant_state
        return before


def _state(module: nn.Module, packed: Packed) -> Any:
    # On the weight, and on the layer for when FSDP has put a plain tensor in its place.
    return getattr(packed[PLAIN], "quant_state", None) or module.quant_state


class Bitsandbytes8bit(_Bitsandbytes):
    """``Linear8bitLt`` with quantized weights: 8-bit codes with a scale for each row."""

    supported = "bitsandbytes.nn.Linear8bitLt"
    layer = "Linear8bitLt"
    attributes = ("index", "source_cls", "state")

    def holds(self, module: nn.Module) -> bool:
        # With float16 weights, quantized in each forward pass, it is a linear layer like others.
        return super().holds(module) and not module.state.has_fp16_weights  # type: ignore[union-attr]

    def shape(self, module: nn.Module, packed: Packed) -> torch.Size:
        return self.codes(packed).shape

    def dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        bias: Any = module.bias
        return None if bias is None else bias.dtype

    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        return self.codes(packed).detach().float() * (_scales(module, packed).float() / 127).view(-1, 1)

    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        import bitsandbytes

        library: Any = bitsandbytes
        new: nn.Parameter = library.nn.Int8Params(weight.cpu(), requires_grad=False)
        return {PLAIN: new.to(self.codes(packed).device)}

    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        return {"library": "bitsandbytes", "bits": 8, "threshold": float(module.state.threshold)}  # type: ignore[union-attr,arg-type]

    def size(self, module: nn.Module, packed: Packed) -> int:
        return self.codes(packed).numel() + _scales(module, packed).numel() * 4

    def is_ready(self, module: nn.Module, packed: Packed) -> bool:
        return self.codes(packed).dtype == torch.int8

    def swap(self, module: nn.Module, other: Packed) -> Packed:
        # A forward pass moves codes and scales from the weight to the layer, and the next would find them there still.
        state, own = module.state, module._parameters["weight"]
        if state.SCB is not None:  # type: ignore[union-attr]
            own.CB, own.SCB, state.CB, state.SCB = state.CB, state.SCB, None, None  # type: ignore[union-attr]
        return super().swap(module, other)


def _scales(module: nn.Module, packed: Packed) -> Tensor:
    on_weight: Tensor | None = getattr(packed[PLAIN], "SCB", None)
    return module.state.SCB if on_weight is None else on_weight  # type: ignore[union-attr,return-value]


def _multiply_4bit(
    x: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    block_size: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    code: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    library: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = library.dequantize_blockwise(absmax_8bit, absmax, code, 256, torch.float32) + offset
    weight = library.dequantize_4bit(packed, absmax, block_size, quant_type, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _quantize_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    outliers = x.new_empty(0, dtype=torch.int64) if threshold else None  # which are few
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32).flatten(), outliers


def _multiply_8bit(
    x: Tensor,
    codes: Tensor,
    packed: Tensor,
    rows: Tensor,
    columns: Tensor,
    outliers: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    library: Any = torch.ops.bitsandbytes
    product = library.int8_linear_matmul(codes, packed)
    return library.int8_mm_dequant(product, rows, columns, x.dtype, bias), x.new_empty(x.shape[0], 0)


# What the operators do, by others: for counting memory, where those themselves hide a dequantized weight or look at
# values.
OPERATORS: dict[str, Callable[..., Any]] = {
    "bitsandbytes::gemm_4bit": _multiply_4bit,
    "bitsandbytes::int8_vectorwise_quant": _quantize_rows,
    "bitsandbytes::int8_mixed_scaled_mm": _multiply_8bit,
}
