"""LoRA on ``nn.Embedding``."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapter import LoraAdapter
from lightning_lora.layers.base import LoraLayer, Target
from lightning_lora.layers.folding import RowFold, added_rows
from lightning_lora.layers.functional import low_rank_product


class _NoDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input  # of indices; nested ones have no dropout, be its probability zero


class EmbeddingAdapter(LoraAdapter):
    """``out + scaling * (B A)^T[x]`` with A of shape ``(r, num_embeddings)`` and B of shape ``(embedding_dim, r)``.

    A starts at zero and B is drawn from the normal distribution, as PEFT has it: the other way round than in a linear
    layer, so ``freeze_A`` freezes B here. The input holds indices, so there is nothing to drop out. The row of the
    ``padding_idx`` gets no gradient, and so stays the base's.
    """

    peft_names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    out_dim = 1
    random_factor = "lora_B"

    def __init__(self, weight: Tensor, config: LoraConfig, layer_name: str, adapter_name: str, **layout: Any) -> None:
        super().__init__(weight, config, layer_name, adapter_name, **layout)
        self.dropout = _NoDropout(0.0)

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        num_embeddings, embedding_dim = weight.shape
        return (self.r, num_embeddings), (embedding_dim, self.r)

    def add_path(self, x: Tensor, out: Tensor, layer: nn.Module, lora_B: Tensor) -> Tensor:
        padding_idx: int | None = layer.padding_idx  # type: ignore[assignment]
        low_rank = nn.functional.embedding(x, self.lora_A.t(), padding_idx)
        lora_B = embed_scale(layer) * (self.scaling * lora_B)
        # In the adapter's precision, as the rows were looked up; rounded once.
        return (out + low_rank @ lora_B.t()).to(out.dtype)

    def delta_weight(self) -> Tensor:
        return low_rank_product(self.lora_A, self.lora_B, self.scaling).t()

    def row_fold(self, dtype: torch.dtype) -> RowFold | None:
        lora_A, lora_B = self.lora_A, self.lora_B
        return added_rows(dtype, lambda rows: low_rank_product(lora_A[:, rows], lora_B, self.scaling).t())

    def initial_kinds(self) -> tuple[str, str]:
        return "normal" if self._init is False else "zeros", "normal"


class LoraEmbedding(LoraLayer):
    """``nn.Embedding``, and its subclasses that multiply the rows by a number, ``embed_scale``."""

    adapter_class = EmbeddingAdapter
    supported = "torch.nn.Embedding"
    group = ""

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        assert isinstance(target.module, nn.Embedding)
        return lookup_unsupported_reason(target.module) or super().unsupported_reason(target, config)


def lookup_unsupported_reason(module: nn.Embedding) -> str | None:
    """Why this embedding is not a look-up in a frozen weight, ``None`` if it is."""
    if module.max_norm is not None:
        return "max_norm changes its weight at every look-up, so it cannot be frozen"
    if module.sparse or module.scale_grad_by_freq:
        return "sparse and scale_grad_by_freq are for the gradient of its own weight, which is frozen; turn them off"
    if type(module).forward is not nn.Embedding.forward and torch.as_tensor(embed_scale(module, ())).numel() != 1:
        return "its class has a forward of its own, which may not be a look-up in its weight"
    return None


def embed_scale(layer: nn.Module, default: Any = 1.0) -> Any:
    """What the forward of many of transformers' embeddings multiplies the rows by."""
    scale = getattr(layer, "embed_scale", default)
    return scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else scale  # type: ignore[arg-type]
