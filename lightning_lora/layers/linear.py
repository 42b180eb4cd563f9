"""LoRA on ``nn.Linear`` and on transformers' ``Conv1D``, a linear layer that stores its weight transposed."""

from torch import Tensor, nn

from lightning_lora.functional import add_low_rank, low_rank_product
from lightning_lora.layers.base import LoraAdapter, LoraLayer
from lightning_lora.layers.dora import DoraAdapter


class LinearAdapter(LoraAdapter):
    """``out + scaling * B A dropout(x)`` with A of shape ``(r, in_features)`` and B of shape ``(out_features, r)``."""

    def shapes(self, base_layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = base_layer.weight.shape  # type: ignore[union-attr,misc]
        return (self.r, in_features), (out_features, self.r)

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        return add_low_rank(out, self.dropout(x), self.lora_A, self.lora_B, self.scaling)

    def delta_weight(self) -> Tensor:
        return low_rank_product(self.lora_A, self.lora_B, self.scaling)


class Conv1DAdapter(LinearAdapter):
    """The same for a weight of shape ``(in_features, out_features)``."""

    def shapes(self, base_layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        in_features, out_features = base_layer.weight.shape  # type: ignore[union-attr,misc]
        return (self.r, in_features), (out_features, self.r)

    def delta_weight(self) -> Tensor:
        return super().delta_weight().t()


class DoraLinearAdapter(DoraAdapter, LinearAdapter):
    """DoRA on ``nn.Linear``."""


class DoraConv1DAdapter(DoraAdapter, Conv1DAdapter):
    """DoRA on ``Conv1D``, whose weight has a column for each output."""

    def rows(self, weight: Tensor) -> Tensor:
        return weight.t()


class LoraLinear(LoraLayer):
    """``nn.Linear`` and its subclasses."""

    adapter_class = LinearAdapter
    dora_class = DoraLinearAdapter


class LoraConv1D(LoraLayer):
    """``transformers.pytorch_utils.Conv1D``."""

    adapter_class = Conv1DAdapter
    dora_class = DoraConv1DAdapter
