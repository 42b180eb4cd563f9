"""Linear layers whose weight is packed in a way that nothing here reads: refused by name, and never left out silently.

They are told by what they hold, so that no list of libraries has to be kept: ``in_features`` and ``out_features``,
matrices of whole numbers or of numbers of 8 bits, and no parameter named ``weight``. So it is in GPTQ, AWQ, AQLM,
compressed-tensors and their like.
"""

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.base import LoraLayer, Target
from lightning_lora.layers.quantized import WAY_ON


class LoraUnreadLinear(LoraLayer):
    """What stands for such a layer among those that all linear ones mean; none is adapted."""

    supported = ""
    reads_packed = True

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        if isinstance(module, torch.jit.ScriptModule):  # whose code is no layer's of a library
            return False
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        is_sized = all(isinstance(size, int) for size in sizes)
        has_own = module._parameters.get("weight") is not None or bool(module._modules)
        return is_sized and not has_own and bool(_packed(module))

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        return ()

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        names = ", ".join(f"{name} ({tensor.dtype})" for name, tensor in _packed(target.module).items())
        return f"its weight is packed in {names}, a format of which the values cannot be read here: {WAY_ON}"


def _packed(module: nn.Module) -> dict[str, Tensor]:
    """The matrices of codes that a module itself holds."""
    tensors = {**module._parameters, **module._buffers}
    return {name: each for name, each in tensors.items() if each is not None and each.dim() > 1 and _is_code(each)}


def _is_code(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return tensor.element_size() == 1
    return not tensor.is_complex() and tensor.dtype is not torch.bool  # which masks are of
