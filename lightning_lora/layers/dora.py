"""DoRA: a magnitude for each output beside the low-rank update of the direction.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353. The adapted weight is
``m * V / |V|`` with ``V = W0 + scaling * B A`` and norms over each row; the norm is held constant in the backward pass
(their section 4.3), and ``m`` starts at ``|W0|``, so that a fresh adapter changes nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.functional import add_low_rank
from lightning_lora.layers.base import LoraAdapter


class DoraAdapter(LoraAdapter):
    """Mixin for an adapter of a linear layer, with ``lora_magnitude_vector`` of shape ``(out_features,)``."""

    peft_names = {**LoraAdapter.peft_names, "lora_magnitude_vector": "lora_magnitude_vector"}

    lora_magnitude_vector: nn.Parameter

    def __init__(self, base_layer: nn.Module, config: LoraConfig, layer_name: str, adapter_name: str) -> None:
        super().__init__(base_layer, config, layer_name, adapter_name)
        weight = self.rows(base_layer.weight)  # type: ignore[arg-type]
        self.lora_magnitude_vector = nn.Parameter(self._norm(weight).to(self.lora_B.dtype))

    rows: Callable[[Tensor], Tensor]  # of the linear layer's adapter

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        x_dropped = self.dropout(x)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        if self.training and self.dropout.p > 0:
            # The magnitude scales the whole of V, which then sees the same input.
            base = nn.functional.linear(x_dropped, self.rows(weight))
        else:
            base = out if bias is None else out - bias
        scale = self.lora_magnitude_vector / self._norm(self.rows(weight))
        out = torch.addcmul(out, base.to(out.dtype), (scale - 1).to(out.dtype))
        return add_low_rank(out, x_dropped, self.lora_A, scale.unsqueeze(1) * self.lora_B, self.scaling)

    def fold(self, weight: Tensor) -> Tensor:
        folded = self.rows(weight + self.delta_weight())
        norm = torch.linalg.vector_norm(folded, dim=1).clamp_min(torch.finfo(folded.dtype).tiny)
        folded = folded * (self.lora_magnitude_vector / norm).unsqueeze(1)
        return self.rows(folded)

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        """``|W0 + scaling * B A|`` by rows, in float32 or better, without a matrix of the weight's size.

        ``|w + u|^2 = |w|^2 + 2 w.u + |u|^2``, where ``u`` is a row of ``scaling * B A``.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        lora_A, lora_B = self.lora_A.to(dtype), self.scaling * self.lora_B.to(dtype)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        cross = ((weight @ self.lora_A.to(weight.dtype).t()).to(dtype) * lora_B).sum(1)
        update = ((lora_B @ (lora_A @ lora_A.t())) * lora_B).sum(1)
        # A row of zeros has no direction; it stays zero.
        norm: Tensor = (squares + 2 * cross + update).sqrt()
        return norm.clamp_min(torch.finfo(dtype).tiny)
