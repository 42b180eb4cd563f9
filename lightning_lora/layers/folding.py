"""A weight with adapters merged in, made by blocks of its rows: no copy of it in float32 is ever there as a whole."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

# Adds an adapter's update to rows of the weight, in place, given them in float32 or better and which they are.
RowFold = Callable[[Tensor, slice], object]

_NUMBERS = 1 << 19  # in a block, which then is in a CPU's cache from its first pass to its last
_ROWS = 64  # in a block of a matrix, at least: of fewer, products are added up in other orders
_PADDING = 16  # numbers
_ALIGNED = 64  # numbers in a row, whose multiples are padded


def is_foldable(weight: Tensor) -> bool:
    """Whether blocks can be made of a weight: one of torch's own types, with its numbers in it."""
    return type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and weight.dim() > 1


@torch.no_grad()
def folded_by_rows(weight: Tensor, folds: Sequence[RowFold]) -> tuple[Tensor, bool]:
    """A weight with adapters merged in.

    Each block is computed in float32 or better and rounded once, in one buffer for all.

    Args:
        weight: At least two dimensions, of which the first counts the rows.
        folds: Of the adapters, in their order.

    Returns:
        The merged weight, in the weight's dtype, and whether all of it is finite.
    """
    merged = torch.empty_like(weight)
    finite = True
    buffer: Tensor | None = None
    for rows in _blocks(weight):
        buffer = _buffer_for(weight[rows]) if buffer is None else buffer
        block = buffer[: rows.stop - rows.start].copy_(weight[rows])
        for fold in folds:
            fold(block, rows)
        finite = is_finite(merged[rows].copy_(block)) and finite
    return merged, finite


def added_rows(dtype: torch.dtype, update: Callable[[slice], Tensor]) -> RowFold | None:
    """Adds an update to rows, given what it is for some; ``None`` if it is wider than the ``dtype`` of the rows."""
    if torch.promote_types(update(slice(0, 0)).dtype, dtype) != dtype:
        return None
    return lambda weight, rows: weight.add_(update(rows))


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, in one pass and without the temporaries of ``torch.isfinite``."""
    if bool(tensor.sum().isfinite()):  # which that of no other numbers is
        return True
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Which rows make up each block, the first the largest. Other devices than a CPU have no use for several."""
    rows = len(weight)
    least = max(_NUMBERS // max(1, weight[:1].numel()), _ROWS if weight.dim() == 2 else 1)
    count = max(1, rows // least) if weight.device.type == "cpu" else 1
    ends = itertools.accumulate(rows // count + (block < rows % count) for block in range(count))
    yield from itertools.starmap(slice, itertools.pairwise((0, *ends)))


def _buffer_for(block: Tensor) -> Tensor:
    """A block in float32 or better, without values.

    Where the rows of a matrix are a power of two apart, they share few lines of a CPU's cache, and the product takes
    four times as long. So they are put further apart.
    """
    *rows, columns = block.shape
    padding = _PADDING if block.device.type == "cpu" and columns % _ALIGNED == 0 else 0
    dtype = torch.promote_types(block.dtype, torch.float32)
    return torch.empty(*rows, columns + padding, dtype=dtype, device=block.device)[..., :columns]
