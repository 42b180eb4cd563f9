"""Linear layers whose weight is kept in fewer bits, one file a library; here is their registry."""

import torch
from torch import nn

from lightning_lora.layers.quantized.bitsandbytes import Bitsandbytes4bit, Bitsandbytes8bit
from lightning_lora.layers.quantized.hqq import HQQ
from lightning_lora.layers.quantized.storage import Packed, QuantizedStorage
from lightning_lora.layers.quantized.torchao import Torchao, TorchaoNF4

__all__ = ["WAY_ON", "Packed", "QuantizedStorage", "register_quantized_storage", "storage_of", "supported_storages"]

# For errors, where a format is not known.
WAY_ON = (
    "load the base in full precision (which for compressed-tensors is CompressedTensorsConfig(dequantize=True)), or "
    "quantized by bitsandbytes, torchao or HQQ; register_quantized_storage adds a format"
)
_storages: list[QuantizedStorage] = [Bitsandbytes4bit(), Bitsandbytes8bit(), Torchao(), TorchaoNF4(), HQQ()]


def register_quantized_storage(storage: QuantizedStorage) -> None:
    """Have a further kind of quantized linear layers adapted, merged and exported.

    Args:
        storage: What answers for them. It is asked before those that are there.
    """
    _storages.insert(0, storage)


def storage_of(module: nn.Module) -> QuantizedStorage | None:
    """How a layer's weight is kept in fewer bits, ``None`` if it is not."""
    if isinstance(module, torch.jit.ScriptModule):  # whose code is no layer's of a library
        return None
    return next((storage for storage in _storages if storage.holds(module)), None)


def supported_storages() -> str:
    """The quantized layers that can be adapted, in words."""
    return ", ".join(storage.supported for storage in _storages)
