"""LoRA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from typing import Optional

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.config import LoraConfig
from lightning_lora.functional import low_rank_product
from lightning_lora.layers.base import LoraAdapter, LoraLayer, Target
from lightning_lora.layers.dora import DoraAdapter

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ConvAdapter(LoraAdapter):
    """``out + scaling * B * A * dropout(x)``, where ``*`` between tensors is a convolution.

    A, of shape ``(r, in_channels, *kernel_size)``, is a convolution like the base: the same stride, padding, padding
    mode and dilation. B, of shape ``(out_channels, r, 1, ...)``, is one over single positions. So A and B, flattened,
    are the factors of an update of the base weight. PEFT 0.21 leaves out dilation and padding mode in its forward, and
    then computes something else than it merges.

    Layers with ``groups > 1`` are refused. PEFT's A sees all input channels there, which a weight of shape
    ``(out_channels, in_channels / groups, *kernel_size)`` cannot hold: PEFT does not merge such an adapter either.
    """

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, in_channels, *kernel_size = weight.shape
        return (self.r, in_channels, *kernel_size), (out_channels, self.r, *(1 for _ in kernel_size))

    def add_path(self, x: Tensor, out: Tensor, layer: nn.Module, lora_B: Tensor) -> Tensor:
        low_rank: Tensor = layer._conv_forward(x, self.lora_A.to(x.dtype), None)  # type: ignore[operator]
        lora_B = (self.scaling * lora_B).to(low_rank.dtype)
        return out + _POINTWISE[lora_B.dim()](low_rank, lora_B).to(out.dtype)

    def base_product(self, x: Tensor, layer: nn.Module) -> Tensor:
        product: Tensor = layer._conv_forward(x, layer.weight, None)  # type: ignore[operator]
        return product

    def delta_weight(self) -> Tensor:
        product = low_rank_product(self.lora_A.flatten(1), self.lora_B.flatten(1), self.scaling)
        return product.view(-1, *self.lora_A.shape[1:])


class DoraConvAdapter(DoraAdapter, ConvAdapter):
    """DoRA on a convolution: a magnitude for each output channel."""


class LoraConv(LoraLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, and subclasses that leave the forward as it is."""

    adapter_class = ConvAdapter
    dora_class = DoraConvAdapter
    is_linear = False

    @classmethod
    def objection(cls, target: Target, config: LoraConfig) -> Optional[str]:
        module = target.module
        kind = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        if module.groups > 1:  # type: ignore[operator]
            return f"it has groups={module.groups}, and the update of a grouped convolution could not be merged"
        if type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:  # type: ignore[attr-defined]
            return "its class has a forward of its own, which may not be a plain convolution with its weight"
        return super().objection(target, config)
