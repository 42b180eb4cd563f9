"""LoRA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapter import LoraAdapter
from lightning_lora.layers.base import LoraLayer, Target
from lightning_lora.layers.functional import low_rank_product

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ConvAdapter(LoraAdapter):
    """``out + scaling * B * A * dropout(x)``, where ``*`` between tensors is a convolution.

    A, of shape ``(r, in_channels / groups, *kernel_size)``, is a convolution like the base: the same stride, padding,
    padding mode, dilation and groups. B, of shape ``(out_channels, r / groups, 1, ...)``, is one over single positions
    with these groups. So A and B, flattened, are the factors of an update of the base weight, by groups. PEFT 0.21
    leaves out dilation and padding mode in its forward, and then computes something else than it merges.

    With ``groups > 1``, PEFT's A sees all input channels, which the base weight cannot, and so cannot be merged. Ours
    is PEFT's with zeros where A would look at another group's channels.
    """

    groups: int

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, in_channels, *kernel_size = weight.shape
        return (self.r, in_channels, *kernel_size), (out_channels, self.r // self.groups, *(1 for _ in kernel_size))

    def add_path(self, x: Tensor, out: Tensor, layer: nn.Module, lora_B: Tensor) -> Tensor:
        low_rank: Tensor = layer._conv_forward(x, self.lora_A.to(x.dtype), None)  # type: ignore[operator]
        lora_B = (self.scaling * lora_B).to(low_rank.dtype)
        return out + _POINTWISE[lora_B.dim()](low_rank, lora_B, groups=self.groups).to(out.dtype)

    def base_product(self, x: Tensor, layer: nn.Module) -> Tensor:
        product: Tensor = layer._conv_forward(x, layer.weight, None)  # type: ignore[operator]
        return product

    def delta_weight(self) -> Tensor:
        by_group = zip(self.lora_A.flatten(1).chunk(self.groups), self.lora_B.flatten(1).chunk(self.groups))
        products = [low_rank_product(lora_A, lora_B, self.scaling) for lora_A, lora_B in by_group]
        return torch.cat(products).view(-1, *self.lora_A.shape[1:])

    def peft_tensors(self) -> dict[str, Tensor]:
        tensors = super().peft_tensors()
        if self.groups > 1:
            wide = self.lora_A.new_zeros(self.r, self.groups, *self.lora_A.shape[1:])
            wide[self._own_channels()] = self.lora_A
            tensors[self.peft_names["lora_A"]] = wide.flatten(1, 2)
        return tensors

    def from_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = super().from_peft(tensors)
        if self.groups > 1:
            wide = own["lora_A"].reshape(self.r, self.groups, *self.lora_A.shape[1:])
            own["lora_A"] = wide[self._own_channels()]
            if own["lora_A"].count_nonzero() < wide.count_nonzero():
                raise ValueError(
                    f"the A of {self.layer_name} looks at all input channels, and a convolution with groups at its own"
                )
        return own

    def _own_channels(self) -> tuple[Tensor, Tensor]:
        """Each row of A, and the group that it belongs to."""
        rows = torch.arange(self.r)
        return rows, rows // (self.r // self.groups)


def is_misrun_by_peft(module: nn.Module) -> bool:
    """Whether a convolution dilates, or pads otherwise than with zeros, which PEFT leaves out until it merges."""
    if not isinstance(module, CONVOLUTIONS) or max(module.kernel_size) == 1:
        return False
    pads = module.padding_mode != "zeros" and module.padding not in ("valid", (0,) * len(module.kernel_size))
    return pads or max(module.dilation) > 1


class LoraConv(LoraLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, and subclasses that leave the forward as it is."""

    adapter_class = ConvAdapter
    supported = "torch.nn.Conv1d, Conv2d and Conv3d"
    group = "conv"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, CONVOLUTIONS)

    def misrun_by_peft(self) -> str | None:
        return "leaves out dilation and padding modes until it merges" if is_misrun_by_peft(self) else None

    @classmethod
    def layout(cls, target: Target, config: LoraConfig) -> dict[str, Any]:
        return {"groups": target.module.groups}

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        module = target.module
        kind = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        groups: int = module.groups  # type: ignore[assignment]
        if config.rank(target.name) % groups:
            return (
                f"it has groups={groups}, by which the rank must be divisible, and that is {config.rank(target.name)}"
            )
        if config.use_dora and groups > 1:
            return f"use_dora is not for convolutions with groups, and it has {groups}"
        if type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:  # type: ignore[attr-defined]
            return "its class has a forward of its own, which may not be a plain convolution with its weight"
        return super().unsupported_reason(target, config)
