"""NaN and infinity in tensors, looked for in one pass over all of them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# What adapters are trained and saved in; torch has no arithmetic for the smaller ones.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def total_norm(tensors: Iterable[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all values, which is NaN or infinite if one of them is; of sharded tensors, of what is here.

    Args:
        tensors: Of floating-point types.
        order: 2 is the fastest, but is infinite too where the sum of squares is too large for the type; ``inf``, the
            largest absolute value, is exact.

    Returns:
        Shape ``()``, on the device of the first. Nothing waits for it until it is read.
    """
    found = [values for tensor in tensors for values in [_values(tensor)] if values.numel()]
    return torch.nn.utils.get_total_norm(found, order)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that have a NaN or an infinity."""
    if bool(total_norm(tensors.values()).isfinite()):
        return []
    return [name for name, tensor in tensors.items() if not bool(total_norm([tensor], torch.inf).isfinite())]


def _values(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.coalesce().values() if tensor.is_sparse else tensor
