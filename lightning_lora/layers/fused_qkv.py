"""LoRA on chosen parts of a projection that computes query, key and value in one: each part with an A and B of its own.

Source: ``MergedLinear`` of the paper's authors (https://github.com/microsoft/LoRA), where the parts are consecutive.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear

from lightning_lora.config import LoraConfig
from lightning_lora.layers.base import Target
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter, LoraLinear

NAMES = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")
# Transformers' modules that keep query, key and value of each head (or group of heads) together.
_BY_HEAD = ("BloomAttention", "FalconAttention", "GPTBigCodeAttention", "GPTNeoXAttention", "PersimmonAttention")


class FusedAdapter(LinearAdapter):
    """The paths of the chosen parts, side by side.

    A has shape ``(parts * r, in_features)``. B has the rows of all chosen parts, ``(rows, r)``: those of the first, of
    the second and so on. To PEFT it is a plain LoRA of rank ``parts * r`` whose B is zero outside of these blocks.
    """

    is_matrix = False
    follows_tensor_parallel = False

    parts: list[Tensor]  # of each chosen part, the outputs that it has
    out_features: int

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        self.rank_factor = len(self.parts)
        rows = sum(len(part) for part in self.parts)
        return (len(self.parts) * self.r, self.rows(weight).shape[1]), (rows, self.r)

    def add_path(self, x: Tensor, out: Tensor, layer: nn.Module, lora_B: Tensor) -> Tensor:
        low_rank = torch.split(x @ self.lora_A.to(x.dtype).t(), self.r, dim=-1)
        blocks = torch.split((self.scaling * lora_B).to(x.dtype), [len(part) for part in self.parts])
        paths = torch.cat([part @ block.t() for part, block in zip(low_rank, blocks)], dim=-1)
        return out.index_add(-1, torch.cat(self.parts).to(out.device), paths.to(out.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self._whole()

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self._whole()}

    def from_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = tensors["lora_B.weight"]
        blocks = [whole[part, i * self.r : (i + 1) * self.r] for i, part in enumerate(self.parts)]
        if sum(block.count_nonzero() for block in blocks) < whole.count_nonzero():
            raise ValueError(f"the update of {self.layer_name} is not one of the parts of fused_qkv alone")
        return {"lora_A": tensors["lora_A.weight"], "lora_B": torch.cat(blocks)}

    def _whole(self) -> Tensor:
        return in_blocks(self.lora_B, self.parts, self.out_features)


def in_blocks(lora_B: Tensor, parts: list[Tensor], out_features: int) -> Tensor:
    """B for all outputs and the ranks of all parts side by side, zero outside of the block of each part.

    Args:
        lora_B: The rows of all parts, those of the first first, shape ``(rows, r)``.
        parts: Of each part, the outputs that it has.
        out_features: The number of all outputs.

    Returns:
        Shape ``(out_features, parts * r)``.
    """
    r = lora_B.shape[1]
    whole = lora_B.new_zeros(out_features, len(parts) * r)
    for i, (part, block) in enumerate(zip(parts, torch.split(lora_B, [len(part) for part in parts]))):
        whole[part, i * r : (i + 1) * r] = block
    return whole


class FusedConv1DAdapter(FusedAdapter, Conv1DAdapter):
    """The same for a weight of shape ``(in_features, out_features)``."""


class LoraFusedLinear(LoraLinear):
    """``nn.Linear`` that computes query, key and value."""

    adapter_class = FusedAdapter

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return False  # fused_qkv chooses

    @classmethod
    def layout(cls, target: Target, config: LoraConfig) -> dict[str, Any]:
        rows = qkv_rows(target.module, target.parent)
        assert rows is not None and config.fused_qkv is not None
        parts = [rows[part] for part in ("q", "k", "v") if part in config.fused_qkv]
        return {"parts": parts, "out_features": sum(map(len, rows.values()))}


class LoraFusedConv1D(LoraFusedLinear):
    """The same for transformers' ``Conv1D``."""

    adapter_class = FusedConv1DAdapter


def fused_class_for(module: nn.Module, parent: nn.Module | None, name: str) -> type[LoraFusedLinear] | None:
    """The class that adapts parts of this projection, ``None`` if it does not compute query, key and value in one."""
    if name.rpartition(".")[2] not in NAMES or qkv_rows(module, parent) is None:
        return None
    return LoraFusedLinear if isinstance(module, Linear) else LoraFusedConv1D


def qkv_rows(module: nn.Module, parent: nn.Module | None) -> dict[str, Tensor] | None:
    """Which outputs of a fused projection are query, key and value; ``None`` if it is none that is known.

    They are consecutive, or so for each head. Keys and values may have fewer heads than queries.

    Args:
        module: The projection.
        parent: The attention around it, which or whose ``config`` says how many heads there are. Else, the three parts
            are equal.
    """
    out_features = int(getattr(module, "nf", getattr(module, "out_features", 0)))
    config: Any = getattr(parent, "config", None)
    heads = int(getattr(config, "num_attention_heads", getattr(parent, "num_heads", 1)))
    kv_heads = _kv_heads(config, heads)
    head_dim, rest = divmod(out_features, heads + 2 * kv_heads)
    if rest or not head_dim:
        return None
    groups = 1
    if type(parent).__name__ in _BY_HEAD and kv_heads > 1:
        groups = kv_heads
    sizes = [heads * head_dim // groups, kv_heads * head_dim // groups, kv_heads * head_dim // groups]
    parts = torch.split(torch.arange(out_features).view(groups, -1), sizes, dim=1)
    return {name: part.flatten() for name, part in zip(("q", "k", "v"), parts)}


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "new_decoder_architecture", False):  # Falcon
        return int(config.num_kv_heads)
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or heads)
