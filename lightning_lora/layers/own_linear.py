"""LoRA on subclasses of ``nn.Linear`` that compute something else: with masked, normalized or scaled weights.

What such a forward adds to is not ``x W^T``, so the path of a low-rank product beside it is not what would be merged:
the weight is adapted where the forward reads it.
"""

from torch import nn
from torch.nn import Linear  # by its own name, for Lightning's BitsandbytesPrecision has nn.Linear be another class

from lightning_lora.config import LoraConfig
from lightning_lora.layers.base import Target
from lightning_lora.layers.parameters import LoraParameters
from lightning_lora.layers.readable import weightless_reason


class LoraOwnLinear(LoraParameters):
    """A subclass of ``nn.Linear`` with a forward that computes something else with its weight."""

    supported = "its subclasses"
    group = "linear"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, Linear)

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        return weightless_reason(target.module) or super().unsupported_reason(target, config)
