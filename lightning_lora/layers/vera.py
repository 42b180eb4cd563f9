"""VeRA: one random pair of matrices for all layers, and two trained vectors for each.

Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. The update of a weight is
``diag(b) B diag(d) A`` with A and B frozen, ``d`` small and ``b`` zero at the start.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapter import Adapter, LoraAdapter
from lightning_lora.layers.base import LoraLayer
from lightning_lora.layers.folding import RowFold, added_rows
from lightning_lora.layers.functional import add_from_rank, low_rank_product
from lightning_lora.layers.linear import LoraConv1D, LoraLinear


class Projections(nn.Module):
    """The pair that all layers share, as wide as the widest: each layer uses the first columns of A and rows of B.

    It is a module of its own, so that it stays one when the model moves or is copied. It is in no checkpoint, since the
    seed gives it again; drawn as PEFT draws it from its ``projection_prng_key``. The two are no buffers, which DDP
    would send to all processes in every forward pass.
    """

    def __init__(self, r: int, in_features: int, out_features: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self._seed = seed
        self.vera_A = torch.empty(r, in_features, device=device)
        self.vera_B = torch.empty(out_features, r, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both, the same values each time; on the meta device this is left for later."""
        generator = torch.Generator().manual_seed(self._seed)
        for tensor in (self.vera_A, self.vera_B):
            bound = math.sqrt(6 / tensor.shape[1])  # Kaiming-uniform for ReLU
            tensor.copy_(torch.empty(tensor.shape, device="cpu").uniform_(-bound, bound, generator=generator))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Projections":
        # Each layer passes its move or cast on to the pair that all have, and all but the first find it done.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.vera_A, self.vera_B = fn(self.vera_A), fn(self.vera_B)
        return self


class VeraAdapter(LoraAdapter):
    """``out + b * (B (d * (A dropout(x))))`` with the vectors d, of shape ``(r,)``, and b, ``(out_features,)``."""

    peft_names = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    peft_type = "VERA"
    shared_names = ("vera_A", "vera_B")

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
        x, (vera_A, vera_B) = self.dropout(x), self.sliced()
        # d goes into the rank-wide product, so that x is not kept for its gradient; b goes into B, so that no tensor
        # of the output's size is.
        low_rank = nn.functional.linear(x, vera_A.to(x.dtype))
        low_rank = low_rank * self.vera_lambda_d.to(low_rank.dtype)
        return add_from_rank(out, low_rank, self.vera_lambda_b.unsqueeze(1) * vera_B, 1.0)

    def sliced(self) -> tuple[Tensor, Tensor]:
        """The parts of A and B that this layer uses, on its own device."""
        device = self.vera_lambda_b.device  # layers may be on several, and the pair is on one
        shared = self.projections
        return shared.vera_A[:, : self.in_features].to(device), shared.vera_B[: self.out_features].to(device)

    def delta_weight(self) -> Tensor:
        lora_A, lora_B = self._factors()
        return low_rank_product(lora_A, lora_B, 1.0).movedim(0, self.out_dim)

    def row_fold(self, dtype: torch.dtype) -> RowFold | None:
        lora_A, lora_B = self._factors()
        if self.out_dim == 0:
            return added_rows(dtype, lambda rows: low_rank_product(lora_A, lora_B[rows], 1.0))
        return added_rows(dtype, lambda rows: low_rank_product(lora_A[:, rows], lora_B, 1.0).t())

    def _factors(self) -> tuple[Tensor, Tensor]:
        vera_A, vera_B = self.sliced()
        return self.vera_lambda_d.unsqueeze(1) * vera_A, self.vera_lambda_b.unsqueeze(1) * vera_B

    @classmethod
    def connect(cls, adapters: Sequence[Adapter], config: LoraConfig) -> None:
        every: Sequence[Any] = adapters
        widest_in, widest_out = max(each.in_features for each in every), max(each.out_features for each in every)
        shared = Projections(config.r, widest_in, widest_out, config.seed, every[0].vera_lambda_b.device)
        for adapter in every:
            adapter.projections = shared

    @classmethod
    def shared_tensors(cls, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        first: Any = adapters[0]
        return {name: getattr(first.projections, name).cpu() for name in cls.shared_names}

    @classmethod
    def to_peft_config(cls, settings: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
        kept = (
            "base_model_name_or_path", "task_type", "inference_mode", "target_modules", "modules_to_save",
            "fan_in_fan_out",
        )  # fmt: skip
        return {
            "peft_type": cls.peft_type,
            **{name: settings[name] for name in kept},
            "r": config.r,
            "d_initial": config.vera_d_initial,
            "projection_prng_key": config.seed,
            "save_projection": True,
            "vera_dropout": config.lora_dropout,
            "bias": config.bias.replace("lora_only", "vera_only"),
            "init_weights": True,
        }

    @classmethod
    def from_peft_config(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "r": settings["r"],
            "lora_dropout": settings.get("vera_dropout", 0.0),
            "target_modules": settings["target_modules"],
            "layers_to_transform": settings.get("layers_to_transform"),
            "layers_pattern": settings.get("layers_pattern"),
            "modules_to_save": settings.get("modules_to_save"),
            "bias": settings.get("bias", "none").replace("vera_only", "lora_only"),
            "seed": settings.get("projection_prng_key", 0),
            "use_vera": True,
            "vera_d_initial": settings.get("d_initial", 0.1),
        }

    @classmethod
    def describe(cls, config: LoraConfig) -> str:
        return f"a VeRA of seed={config.seed}"


class VeraConv1DAdapter(VeraAdapter):
    """The same for a weight of shape ``(in_features, out_features)``."""

    out_dim = 1


VERA: dict[type[LoraLayer], type[Adapter]] = {LoraLinear: VeraAdapter, LoraConv1D: VeraConv1DAdapter}
