"""Rows of an embedding that are trained in full, while the rest of it stays frozen.

A row is replaced, not added to: the adapter holds what the row becomes. Where other modules are tied to the embedding,
as output heads often are, they share its adapter, so that a trained row is one and the same on both sides.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoraLayer, Target
from lightning_lora.layers.embedding import embed_scale, lookup_unsupported_reason
from lightning_lora.layers.functional import is_plain
from lightning_lora.layers.own_forward import has_own_forward


class TokenAdapter(Adapter):
    """The rows of some tokens, ``trainable_tokens`` of shape ``(tokens, embedding_dim)``, which start at the base's.

    Args:
        weight: The embedding's weight, shape ``(num_embeddings, embedding_dim)``. Half-precision weights get float32
            rows, as in :class:`LoraAdapter`.
        tokens: Indices of the rows, in the order in which they are stored.
        layer_name: Qualified name of the embedding.
    """

    peft_names: ClassVar[dict[str, str]] = {"trainable_tokens": "token_adapter.trainable_tokens_delta"}
    sets_whole_weight = True  # its rows, which may be another adapter's too
    reads_weight = True

    index: Tensor
    sorted_index: Tensor
    slots: Tensor
    trainable_tokens: nn.Parameter

    def __init__(self, weight: Tensor, tokens: tuple[int, ...], layer_name: str) -> None:
        super().__init__()
        self.tokens = self.replaced_rows = tokens
        self.layer_name = layer_name
        index = torch.tensor(tokens, device=weight.device)
        sorted_index, slots = index.sort()
        # Known from the config, so no checkpoint needs them.
        for name, value in (("index", index), ("sorted_index", sorted_index), ("slots", slots)):
            self.register_buffer(name, value, persistent=False)
        rows = weight.detach()[index]
        self.trainable_tokens = nn.Parameter(rows.to(torch.promote_types(rows.dtype, torch.float32)))

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        """Put the rows into what the layer made of ``x``: looked-up rows, or logits."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows = self.trainable_tokens.to(weight.dtype)
        if isinstance(layer, nn.Embedding):
            return self._look_up(x, out, layer, rows)
        # The difference goes on top, so that the untouched row gives the base's logit, bit for bit. The base's forward
        # keeps no logits for its backward, so they can be changed in place.
        logits = F.linear(x, rows - weight[self.index]).to(out.dtype)
        add = out.index_add_ if is_plain(x, out, rows) else out.index_add
        return add(-1, self.index, logits)

    def _look_up(self, x: Tensor, out: Tensor, layer: nn.Embedding, rows: Tensor) -> Tensor:
        x = x.long().contiguous()
        found = torch.searchsorted(self.sorted_index, x).clamp(max=len(self.tokens) - 1)
        # As in the base, a look-up gives the padding's row no gradient.
        padding = self.tokens.index(layer.padding_idx) if layer.padding_idx in self.tokens else None
        # All positions take part, also where none is of these tokens, so that every process has a gradient.
        looked_up = F.embedding(self.slots[found], rows * embed_scale(layer), padding)
        return torch.where((self.sorted_index[found] == x).unsqueeze(-1), looked_up.to(out.dtype), out)

    def fold(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.index, self.trainable_tokens.to(weight.dtype))

    def size(self) -> str:
        return f"{len(self.tokens)} rows"

    def mismatch(self, saved: LoraConfig, peft_layer_name: str) -> str | None:
        chosen = saved.trainable_token_indices or []
        there = list(chosen.values()) if isinstance(chosen, dict) else [chosen]
        if list(self.tokens) in there:
            return None
        return (
            f"it holds rows of the tokens {', '.join(map(str, there)) or 'none'}, but those trained here are "
            f"{list(self.tokens)}: use its trainable_token_indices"
        )

    @classmethod
    def peft_settings(cls, adapters: Mapping[str, Adapter], config: LoraConfig) -> dict[str, Any]:
        tokens = {name: list(adapter.tokens) for name, adapter in adapters.items()}  # type: ignore[arg-type]
        return {"trainable_token_indices": tokens}

    def extra_repr(self) -> str:
        return f"tokens={len(self.tokens)}"


class LoraTokens(LoraLayer):
    """``nn.Embedding`` or ``nn.Linear`` of which rows are trained: an embedding, and the heads that are tied to it."""

    adapter_class = TokenAdapter
    has_one_kind = True
    group = ""

    @classmethod
    def new_adapter(
        cls, adapter_class: type[Adapter], target: Target, config: LoraConfig, adapter_name: str
    ) -> nn.Module:
        return TokenAdapter(target.module.weight, target.tokens, target.name)  # type: ignore[arg-type]

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        module = target.module
        if isinstance(module, nn.Embedding):
            reason = lookup_unsupported_reason(module)
        elif isinstance(module, nn.Linear):
            own = type(module).forward is not nn.Linear.forward
            reason = "its class has a forward of its own, which may not be that of nn.Linear" if own else None
        else:
            reason = "only nn.Embedding and nn.Linear have rows for tokens"
        if reason is None and has_own_forward(module):
            return "the object has a forward of its own, which may compute something else with its weight"
        if reason is None and "weight" not in module._parameters:
            return "its weight is computed of others (a parametrization), so no row can be put into it"
        if reason is None and module.weight.is_meta:
            return "its weight is on the meta device, and the rows start at its values: load the weights first"
        return reason

    def peft_targets(self, name: str) -> dict[str, list[str]]:
        return {}

    def peft_wrapped(self) -> dict[str, str]:
        return {"": ".token_adapter.base_layer"}
