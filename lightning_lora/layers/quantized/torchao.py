"""Weights in 8 and 4 bits of torchao: its classes of tensors, in an ordinary ``nn.Linear``."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.class_names import is_a
from lightning_lora.layers.quantized.storage import PLAIN, Packed, QuantizedStorage


class Torchao(QuantizedStorage):
    """What ``torchao.quantization.quantize_`` makes of a weight: whole numbers or float8, with scales."""

    supported = "weights of torchao"
    attributes = ("extra_repr",)
    broadcasts = False

    def holds(self, module: nn.Module) -> bool:
        return is_a(module._parameters.get("weight"), "TorchAOBaseTensor", "torchao.")

    def shape(self, module: nn.Module, packed: Packed) -> torch.Size:
        return self.codes(packed).shape

    def dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        return self.codes(packed).dtype

    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        with torch.no_grad():  # and not of what is detached, which in inference mode torchao's tensors cannot be
            return self.codes(packed).dequantize().float()

    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        from torchao.quantization import PerRow, PerTensor

        like: Any = self.codes(packed).detach()
        make: Any = type(like).from_hp
        weight = weight.to(like.dtype)
        name, block = type(like).__name__, tuple(getattr(like, "block_size", ()))
        granularity = {(1, like.shape[1]): PerRow(), tuple(like.shape): PerTensor()}.get(block)
        if name == "IntxUnpackedToInt8Tensor":
            new = make(weight, block, like.target_dtype)
        elif name == "Int8Tensor" and granularity is not None:
            new = make(weight, granularity)
        elif name == "Float8Tensor" and granularity is not None:
            new = make(weight, float8_dtype=like.qdata.dtype, granularity=granularity)
        else:
            raise ValueError(f"torchao's {name} with blocks of {block} cannot be quantized again.")
        return {PLAIN: nn.Parameter(new, requires_grad=False)}

    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        like: Any = self.codes(packed).detach()
        _, settings = like.__tensor_flatten__()
        return {
            "library": "torchao",
            "tensor": type(like).__name__,
            "codes": str(like.qdata.dtype),
            **{name: _plain(value) for name, value in settings.items() if value is not None and name != "dtype"},
        }

    def size(self, module: nn.Module, packed: Packed) -> int:
        return _bytes(self.codes(packed).detach())


class TorchaoNF4(Torchao):
    """torchao's ``NF4Tensor``: blocks of 4-bit NormalFloat codes, with scales that are quantized too."""

    supported = "torchao's NF4Tensor"

    def holds(self, module: nn.Module) -> bool:
        return is_a(module._parameters.get("weight"), "NF4Tensor", "torchao.")

    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        like: Any = self.codes(packed)
        with torch.no_grad():
            values: Tensor = like.get_original_weight()
        return values.float()

    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        like: Any = self.codes(packed).detach()
        made = type(like).from_tensor(weight.to(like.dtype), like.block_size, like.scaler_block_size)
        return {PLAIN: nn.Parameter(made, requires_grad=False)}

    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        like: Any = self.codes(packed).detach()
        return {
            "library": "torchao",
            "tensor": "NF4Tensor",
            "block_size": like.block_size,
            "scaler_block_size": like.scaler_block_size,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def _bytes(tensor: Any) -> int:
    """The bytes of a tensor, or of all that its class makes it of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)
