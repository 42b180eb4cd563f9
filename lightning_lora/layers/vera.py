"""VeRA: one random pair of matrices for all layers, and two trained vectors for each.

Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. The update of a weight is
``diag(b) B diag(d) A`` with A and B frozen, ``d`` small and ``b`` zero at the start.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.functional import add_low_rank, low_rank_product
from lightning_lora.layers.base import LoraAdapter


class Projections(nn.Module):
    """The pair that all layers share, as wide as the widest: each layer uses the first columns of A and rows of B.

    It is a module of its own, so that it stays one when the model moves or is copied. It is in no checkpoint, since the
    seed gives it again; drawn as PEFT draws it from its ``projection_prng_key``.
    """

    def __init__(self, r: int, in_features: int, out_features: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(6 / shape[1])  # Kaiming-uniform for ReLU
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values.to(device), persistent=False)


class VeraAdapter(LoraAdapter):
    """``out + b * (B (d * (A dropout(x))))`` with the vectors d, of shape ``(r,)``, and b, ``(out_features,)``."""

    peft_names = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}

    projections: Projections
    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter

    def make_parameters(self, weight: Tensor) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.out_features, self.in_features = self.rows(weight).shape
        self.vera_lambda_b = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=weight.device))
        self.vera_lambda_d = nn.Parameter(torch.empty(self.r, dtype=dtype, device=weight.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.vera_lambda_b.zero_()
        self.vera_lambda_d.fill_(self.d_initial)

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        return add_low_rank(out, self.dropout(x), *self.factors(), 1.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of this layer with the vectors in them, which a plain LoRA would have."""
        vera_A: Tensor = self.projections.vera_A[:, : self.in_features]  # type: ignore[index,assignment]
        vera_B: Tensor = self.projections.vera_B[: self.out_features]  # type: ignore[index,assignment]
        return self.vera_lambda_d.unsqueeze(1) * vera_A, self.vera_lambda_b.unsqueeze(1) * vera_B

    def delta_weight(self) -> Tensor:
        return low_rank_product(*self.factors(), 1.0).movedim(0, self.out_dim)


class VeraConv1DAdapter(VeraAdapter):
    """The same for a weight of shape ``(in_features, out_features)``."""

    out_dim = 1


def share_projections(adapters: Iterable[nn.Module], config: LoraConfig) -> None:
    """Give the adapters of one injection the pair that they share."""
    every = [adapter for adapter in adapters if isinstance(adapter, VeraAdapter)]
    if every:
        widest_in, widest_out = max(a.in_features for a in every), max(a.out_features for a in every)
        shared = Projections(config.r, widest_in, widest_out, config.seed, every[0].vera_lambda_b.device)
        for adapter in every:
            adapter.projections = shared
