"""Weights in 4 and 8 bits of bitsandbytes (Dettmers et al., arXiv 2305.14314 and 2208.07339)."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear  # by its own name, for Lightning's BitsandbytesPrecision has nn.Linear be another class

from lightning_lora.layers.quantized.storage import QuantizedStorage

_PACKAGES = ("bitsandbytes.", "lightning.fabric.plugins.precision.bitsandbytes")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class _Bitsandbytes(QuantizedStorage):
    layer: str  # name of the library's class
    attributes: tuple[str, ...]  # of a layer, beside those of nn.Linear

    def holds(self, module: nn.Module) -> bool:
        return any(c.__name__ == self.layer and c.__module__.startswith(_PACKAGES[0]) for c in type(module).__mro__)

    def plain_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        return Linear

    def strip(self, module: nn.Module) -> dict[str, Any]:
        attributes = vars(module)
        taken = {name: attributes.pop(name) for name in self.attributes if name in attributes}
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

    def shape(self, module: nn.Module, packed: Tensor) -> torch.Size:
        return torch.Size(_state(module, packed).shape)

    def dtype(self, module: nn.Module, packed: Tensor) -> torch.dtype | None:
        dtype: torch.dtype = _state(module, packed).dtype
        return dtype

    def dequantized(self, module: nn.Module, packed: Tensor) -> Tensor:
        import bitsandbytes

        library: Any = bitsandbytes
        state = copy.copy(_state(module, packed))
        state.dtype = torch.float32
        values: Tensor = library.functional.dequantize_4bit(packed.detach(), state)
        return values

    def requantized(self, module: nn.Module, packed: Tensor, weight: Tensor) -> nn.Parameter:
        import bitsandbytes

        library: Any = bitsandbytes
        state = _state(module, packed)
        new: nn.Parameter = library.nn.Params4bit(
            weight.cpu(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=packed.dtype,
        ).to(packed.device)
        _state(module, new).dtype = state.dtype
        return new

    def record(self, module: nn.Module, packed: Tensor) -> dict[str, Any]:
        state = _state(module, packed)
        return {
            "library": "bitsandbytes",
            "bits": 4,
            "quant_type": state.quant_type,
            "block_size": state.blocksize,
            "double_quant": bool(state.nested),
        }

    def size(self, module: nn.Module, packed: Tensor) -> int:
        state = _state(module, packed)
        scales = (state.absmax, state.code, *((state.state2.absmax, state.state2.code) if state.nested else ()))
        return sum(tensor.numel() * tensor.element_size() for tensor in (packed, *scales))

    def is_ready(self, module: nn.Module, packed: Tensor) -> bool:
        return _state(module, packed) is not None

    def cast_with(self, module: nn.Module, packed: Tensor) -> torch.dtype | None:
        return packed.dtype if packed.is_floating_point() else None

    def unshardable_reason(self, packed: Tensor, flat: bool) -> str | None:
        if packed.is_floating_point() or not flat:
            return None
        return (
            f"its bits are kept in {packed.dtype}, of which FSDP makes no flat parameters: quantize it with "
            "bnb_4bit_quant_storage in the type of the model's other weights, or use ModelParallelStrategy"
        )

    def refusal(self, module: nn.Module, packed: Tensor) -> str | None:
        if getattr(_state(module, packed), "packing_format_for_cpu", False):
            return (
                "bitsandbytes has packed its weight anew for inference on this processor, which rounds the scales: "
                "load the model again, and put the adapter in before the first evaluation"
            )
        return None

    def swap(self, module: nn.Module, other: nn.Parameter) -> nn.Parameter:
        before = super().swap(module, other)
        if hasattr(other, "quant_state"):
            module.quant_state = other.quant_state
        return before


def _state(module: nn.Module, packed: Tensor) -> Any:
    # On the weight, and on the layer for when FSDP has put a plain tensor in its place.
    return getattr(packed, "quant_state", None) or module.quant_state


class Bitsandbytes8bit(_Bitsandbytes):
    """``Linear8bitLt`` with quantized weights: 8-bit codes with a scale for each row."""

    supported = "bitsandbytes.nn.Linear8bitLt"
    layer = "Linear8bitLt"
    attributes = ("index", "source_cls", "state")

    def holds(self, module: nn.Module) -> bool:
        # With float16 weights, quantized in each forward pass, it is a linear layer like others.
        return super().holds(module) and not module.state.has_fp16_weights  # type: ignore[union-attr]

    def shape(self, module: nn.Module, packed: Tensor) -> torch.Size:
        return packed.shape

    def dtype(self, module: nn.Module, packed: Tensor) -> torch.dtype | None:
        bias: Any = module.bias
        return None if bias is None else bias.dtype

    def dequantized(self, module: nn.Module, packed: Tensor) -> Tensor:
        return packed.detach().float() * (_scales(module, packed).float() / 127).view(-1, 1)

    def requantized(self, module: nn.Module, packed: Tensor, weight: Tensor) -> nn.Parameter:
        import bitsandbytes

        library: Any = bitsandbytes
        new: nn.Parameter = library.nn.Int8Params(weight.cpu(), requires_grad=False).to(packed.device)
        return new

    def record(self, module: nn.Module, packed: Tensor) -> dict[str, Any]:
        return {"library": "bitsandbytes", "bits": 8, "threshold": float(module.state.threshold)}  # type: ignore[union-attr,arg-type]

    def size(self, module: nn.Module, packed: Tensor) -> int:
        return packed.numel() + _scales(module, packed).numel() * 4

    def is_ready(self, module: nn.Module, packed: Tensor) -> bool:
        return packed.dtype == torch.int8

    def swap(self, module: nn.Module, other: nn.Parameter) -> nn.Parameter:
        # A forward pass moves codes and scales from the weight to the layer, and the next would find them there still.
        state, own = module.state, module._parameters["weight"]
        if state.SCB is not None:  # type: ignore[union-attr]
            own.CB, own.SCB, state.CB, state.SCB = state.CB, state.SCB, None, None  # type: ignore[union-attr]
        return super().swap(module, other)


def _scales(module: nn.Module, packed: Tensor) -> Tensor:
    on_weight: Tensor | None = getattr(packed, "SCB", None)
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
    if torch.is_autocast_enabled(x.device.type):  # which casts within the operator
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _quantize_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    outliers = x.new_empty(0, dtype=torch.int64) if threshold else None  # which are few
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32).flatten(), outliers


def _multiply_8bit(
    x: Tensor, codes: Tensor, packed: Tensor, rows: Tensor, columns: Tensor, outliers: Tensor, bias: Tensor | None
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
