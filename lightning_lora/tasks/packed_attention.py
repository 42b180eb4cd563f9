"""Attention of packed rows, each by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightning_lora.compiled import is_compiled


@contextmanager
def rows_by_themselves(model: Any, position_ids: Tensor | None) -> Iterator[None]:
    """Within this context, attention of packed rows is computed for each row, and not under a mask for all pairs.

    On a CPU, the mask's time is that of all pairs of tokens of a pack, of which few are of one row. It changes nothing
    else, and nothing on a GPU, whose kernels want few large calls, in compiled models, and in models that compute parts
    again in the backward pass, which runs outside of this context.

    Args:
        model: The model.
        position_ids: Of packed rows, which begin at zero with each, of shape ``(packs, tokens)``; ``None`` for others.
    """
    if position_ids is None or position_ids.device.type != "cpu" or is_compiled(model) or _computes_again(model):
        yield
        return
    with _RowsByThemselves(position_ids):
        yield


class _RowsByThemselves(TorchFunctionMode):
    """Takes the calls of attention whose mask says nothing but this."""

    def __init__(self, position_ids: Tensor) -> None:
        super().__init__()
        self._positions = position_ids
        starts = (position_ids == 0).index_fill(1, torch.tensor([0]), True).flatten().nonzero().flatten().tolist()
        self._lengths = [end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()])]
        self._mask: Tensor | None = None  # that was found to say this

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and self._fits(*args, **kwargs):
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _fits(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> bool:
        packs = self._positions.shape
        if attn_mask is None or any((len(each), each.shape[-2]) != packs for each in (query, key, value)):
            return False
        if attn_mask is not self._mask:
            self._mask = attn_mask if _same(attn_mask, self._expected()) else None
        return self._mask is not None

    def _expected(self) -> Tensor:
        lengths = torch.tensor(self._lengths)
        row = torch.repeat_interleave(lengths).view(self._positions.shape)
        return (row[:, :, None] == row[:, None, :]).tril()[:, None]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **settings: Any,
    ) -> Tensor:
        # One split of each, since slices would give gradients of the whole size each.
        parts = (torch.split(each.transpose(1, 2).flatten(0, 1), self._lengths) for each in (query, key, value))
        settings |= {"dropout_p": dropout_p, "is_causal": True}
        rows = (
            scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in row), **settings)
            for row in zip(*parts)
        )
        joined = torch.cat([row[0].transpose(0, 1) for row in rows])
        return joined.view(*self._positions.shape, *joined.shape[1:]).transpose(1, 2)


def _same(mask: Tensor, expected: Tensor) -> bool:
    return mask.dtype == torch.bool and mask.dim() == 4 and bool((mask == expected).all())


def _computes_again(model: Any) -> bool:
    """Whether parts of a model are checkpointed, by transformers or by PyTorch's wrapper."""
    return any(
        getattr(module, "gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper"
        for module in model.modules()
    )
