"""DoRA: a magnitude for each output beside the low-rank update of the direction.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353. The adapted weight is
``m * V / |V|`` with ``V = W0 + scaling * B A`` and norms over each row; the norm is held constant in the backward pass
(their section 4.3), and ``m`` starts at ``|W0|``, so that a fresh adapter changes nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapter import Adapter, LoraAdapter
from lightning_lora.layers.base import LoraLayer
from lightning_lora.layers.conv import ConvAdapter, LoraConv
from lightning_lora.layers.embedding import EmbeddingAdapter, LoraEmbedding
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter, LoraConv1D, LoraLinear


class DoraAdapter(LoraAdapter):
    """Mixin for the adapter of any kind of layer, with ``lora_magnitude_vector``: one number for each output.

    It has PEFT's shape: ``(outputs,)``, or ``(1, outputs, 1, ...)`` in a convolution.
    """

    peft_names = {**LoraAdapter.peft_names, "lora_magnitude_vector": "lora_magnitude_vector"}

    sets_whole_weight = True
    reads_weight = True
    follows_tensor_parallel = False

    lora_magnitude_vector: nn.Parameter

    def __init__(self, weight: Tensor, config: LoraConfig, layer_name: str, adapter_name: str, **layout: Any) -> None:
        super().__init__(weight, config, layer_name, adapter_name, **layout)
        norm = self._along_channels(self._norm(weight)).to(self.lora_B.dtype)
        self.lora_magnitude_vector = nn.Parameter(norm if norm.dim() == 1 else norm.unsqueeze(0))

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        x = self.dropout(x)
        bias: Tensor | None = getattr(layer, "bias", None)
        if self.training and self.dropout.p > 0:
            base = self.base_product(x, layer)  # the magnitude scales the whole of V, which then sees the same input
        else:
            base = out if bias is None else out - self._along_channels(bias)
        # Detached, it is constant in forward mode too, which no_grad leaves on.
        weight: Tensor = layer.base_weight()  # type: ignore[operator]
        scale = self.lora_magnitude_vector.flatten() / self._norm(weight).detach()
        base, factor = base.to(out.dtype), self._along_channels(scale - 1).to(out.dtype)
        # Nested tensors have no addcmul.
        out = out + base * factor if out.is_nested else torch.addcmul(out, base, factor)
        # The norm is that of all ranks, so that the mean over rank dropout is the function without it.
        lora_B = self.drop_ranks(self.lora_B, self.rank_dim)
        return self.add_path(x, out, layer, scale.view(-1, *(1 for _ in lora_B.shape[1:])) * lora_B)

    def fold(self, weight: Tensor) -> Tensor:
        folded = weight + self.delta_weight()
        norm = torch.linalg.vector_norm(self.rows(folded), dim=1).clamp_min(torch.finfo(folded.dtype).tiny)
        scale = self.lora_magnitude_vector.flatten() / norm
        scaled: Tensor = folded.movedim(self.out_dim, -1) * scale
        return scaled.movedim(-1, self.out_dim)

    def _along_channels(self, values: Tensor) -> Tensor:
        """One value for each output, in a shape that broadcasts over the layer's output."""
        return values.view(-1, *(1 for _ in self.lora_B.shape[2:]))

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        """``|W0 + scaling * B A|`` by rows, in float32 or better, without a matrix of the weight's size.

        ``|w + u|^2 = |w|^2 + 2 w.u + |u|^2``, where ``u`` is a row of ``scaling * B A``.
        """
        weight = self.rows(weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        lora_A, lora_B = self.lora_A.flatten(1).to(dtype), self.scaling * self.lora_B.flatten(1).to(dtype)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        cross = ((weight @ lora_A.to(weight.dtype).t()).to(dtype) * lora_B).sum(1)
        update = ((lora_B @ (lora_A @ lora_A.t())) * lora_B).sum(1)
        norm: Tensor = (squares + 2 * cross + update).sqrt()
        # A row of zeros has no direction; it stays zero.
        return norm.clamp_min(torch.finfo(dtype).tiny)


class DoraLinearAdapter(DoraAdapter, LinearAdapter):
    """DoRA on ``nn.Linear``."""


class DoraConv1DAdapter(DoraAdapter, Conv1DAdapter):
    """DoRA on ``Conv1D``."""


class DoraConvAdapter(DoraAdapter, ConvAdapter):
    """DoRA on a convolution: a magnitude for each output channel."""


class DoraEmbeddingAdapter(DoraAdapter, EmbeddingAdapter):
    """DoRA on an embedding: a magnitude for each dimension, as in PEFT."""

    peft_names = {**EmbeddingAdapter.peft_names, "lora_magnitude_vector": "lora_magnitude_vector"}


DORA: dict[type[LoraLayer], type[Adapter]] = {
    LoraLinear: DoraLinearAdapter,
    LoraConv1D: DoraConv1DAdapter,
    LoraConv: DoraConvAdapter,
    LoraEmbedding: DoraEmbeddingAdapter,
}
