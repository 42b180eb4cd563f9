"""LoRA on ``nn.Linear`` and on transformers' ``Conv1D``, a linear layer that stores its weight transposed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear  # by its own name, for Lightning's BitsandbytesPrecision has nn.Linear be another class

from lightning_lora.class_names import is_a
from lightning_lora.config import LOFTQ
from lightning_lora.layers.adapted_class import base_class
from lightning_lora.layers.adapter import LoraAdapter
from lightning_lora.layers.base import LoraLayer
from lightning_lora.layers.folding import RowFold
from lightning_lora.layers.functional import PLAIN_TENSORS, add_low_rank, low_rank_linear, low_rank_product
from lightning_lora.layers.init import from_weight, orthogonal, require_part
from lightning_lora.layers.linear_by_trial import computes_linear
from lightning_lora.layers.loftq import loftq
from lightning_lora.layers.own_forward import is_hooked
from lightning_lora.sharding import copy_full_


class LinearAdapter(LoraAdapter):
    """``out + scaling * B A dropout(x)`` with A of shape ``(r, in_features)`` and B of shape ``(out_features, r)``."""

    is_matrix = True
    follows_tensor_parallel = True

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = self.rows(weight).shape
        return (self.r, in_features), (out_features, self.r)

    def add_path(self, x: Tensor, out: Tensor, layer: nn.Module, lora_B: Tensor) -> Tensor:
        return add_low_rank(out, x, self.lora_A, lora_B, self.scaling)

    def is_plain_lora(self) -> bool:
        return type(self) in (LinearAdapter, Conv1DAdapter) and not (
            self.training and (self.dropout.p or self.rank_dropout)
        )

    def base_product(self, x: Tensor, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.base_weight()  # type: ignore[operator]
        return nn.functional.linear(x, self.rows(weight).to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The A and B that the update of the whole weight is the product of."""
        return self.lora_A, self.lora_B

    def delta_weight(self) -> Tensor:
        return low_rank_product(*self.factors(), self.scaling).movedim(0, self.out_dim)

    def fold(self, weight: Tensor) -> Tensor:
        # In one pass over the weight, with nothing of its size in between.
        return torch.addmm(weight, *self._sides(weight.dtype), alpha=self.scaling)

    def row_fold(self, dtype: torch.dtype) -> RowFold | None:
        left, right = self._sides(dtype)
        return lambda weight, rows: weight.addmm_(left[rows], right, alpha=self.scaling)

    def _sides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors in the order in which the weight's rows and columns are theirs."""
        lora_A, lora_B = (factor.to(dtype) for factor in self.factors())
        return (lora_B, lora_A) if self.out_dim == 0 else (lora_A.t(), lora_B.t())

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self._init == "orthogonal" and not self.lora_A.is_meta:
            start = orthogonal(self.lora_A.shape, self.lora_B.shape, self._seed, self._qualified_name)
            self._start_at(*start)

    def init_from_weight(self, weight: Tensor) -> Tensor:
        """Start at a part of the base weight.

        Returns:
            The weight for the base to have beside the adapter, in its dtype.
        """
        require_part(self.rows(weight), str(self._init), self.r, self._qualified_name)
        return self._quantize(weight) if LOFTQ.fullmatch(str(self._init)) else self._take_out(weight)

    @torch.no_grad()
    def _quantize(self, weight: Tensor) -> Tensor:
        quantized, lora_B, lora_A = loftq(self.rows(weight), str(self._init), self.r)
        root = self.scaling**0.5  # so that scaling * B A is the product
        self._start_at(lora_A / root, lora_B / root)
        return quantized.movedim(0, self.out_dim).contiguous()

    @torch.no_grad()
    def _take_out(self, weight: Tensor) -> Tensor:
        """What is left of the weight without the start, rounded to its dtype.

        The start is kept in ``initial_A`` and ``initial_B``, since only with it can the adapter be used on the whole
        base weight.
        """
        self._start_at(
            *from_weight(self.rows(weight), str(self._init), self.r, self.scaling, self._seed, self._qualified_name)
        )
        self.register_buffer("initial_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("initial_B", self.lora_B.detach().clone(), persistent=False)
        self.rank_factor = 2
        delta = self.delta_weight()
        return (weight.to(delta.dtype) - delta).to(weight.dtype)

    def plain_tensors(self) -> dict[str, Tensor]:
        """``W0 - s B0 A0 + s B A = W0 + s [B, -B0] [A; A0]``, if the start was taken out of the weight."""
        tensors = super().plain_tensors()
        if hasattr(self, "initial_A"):
            tensors[self.peft_names["lora_A"]] = torch.cat([self.lora_A, self.initial_A])  # type: ignore[list-item]
            tensors[self.peft_names["lora_B"]] = torch.cat([self.lora_B, -self.initial_B], dim=1)  # type: ignore[operator]
        return tensors

    @torch.no_grad()
    def _start_at(self, lora_A: Tensor, lora_B: Tensor) -> None:
        copy_full_(self.lora_A, lora_A)
        copy_full_(self.lora_B, lora_B)


class Conv1DAdapter(LinearAdapter):
    """The same for a weight of shape ``(in_features, out_features)``."""

    follows_tensor_parallel = False
    out_dim = 1


class LoraLinear(LoraLayer):
    """``nn.Linear``, and other classes that compute the same, whether they are subclasses of it or not."""

    adapter_class = LinearAdapter
    supported = "torch.nn.Linear"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        was_taken = isinstance(module, LoraLinear) and module.adapter_class is LinearAdapter  # and not a part of it
        is_plain = isinstance(module, Linear) and type(module).forward is Linear.forward
        return is_plain or was_taken or computes_linear(module)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        adapter = self.lora[self._active[0]]
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        lora_B = adapter.drop_ranks(adapter.lora_B, adapter.rank_dim)  # type: ignore
        return low_rank_linear(x, self.weight, bias, adapter.lora_A, lora_B, adapter.scaling)  # type: ignore

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out: Tensor = super().base_forward(x, *args, **kwargs)
        weight = self._parameters.get("weight")  # under another name, it was proven to let gradients through
        kind = nn.Parameter if weight is None else type(weight)
        if kind not in PLAIN_TENSORS and x.requires_grad and torch.is_grad_enabled() and not out.requires_grad:
            raise RuntimeError(
                f"A backward pass ends in a weight of type {kind.__name__}, as such of torchao do that "
                "quantize activations too, so layers before it would get wrong gradients. Quantize the weights only "
                "(Int8WeightOnlyConfig and the like)."
            )
        return out

    def _is_plain(self, x: Tensor) -> bool:
        """Whether base and adapter can run as one: a single LoRA on the forward of ``nn.Linear``."""
        if self._merged or len(self._active) != 1 or self._rows is not None or type(self.weight) not in PLAIN_TENSORS:
            return False
        adapter = self.lora[self._active[0]]
        return (
            not self.weight.requires_grad
            and type(adapter) is LinearAdapter
            and not (adapter.training and adapter.dropout.p)
            and base_class(self).forward is nn.Linear.forward
            and self._own_forward is None
            and not is_hooked(adapter)
            and (x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type))
        )


class LoraConv1D(LoraLayer):
    """``transformers.pytorch_utils.Conv1D``."""

    adapter_class = Conv1DAdapter
    supported = "transformers.pytorch_utils.Conv1D"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return is_a(module, "Conv1D", "transformers.pytorch_utils")
