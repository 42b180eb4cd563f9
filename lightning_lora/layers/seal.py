"""Whether a tensor still has the values that it had."""

import torch
from torch import Tensor

_CHUNK = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Seal:
    """Put on a tensor, it tells later whether the tensor was changed since, in whatever way.

    Args:
        tensor: A parameter or buffer.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._dtype = tensor.dtype
        self._version = tensor._version
        self._checksum = checksum(tensor)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has the sealed values; after a cast, whether it was changed by autograd's count."""
        if tensor.dtype != self._dtype:
            return tensor._version == self._version
        return checksum(tensor) == self._checksum


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A number that another value anywhere in the tensor, or another order, changes (but for one chance in 2**64)."""
    if tensor.is_meta or not tensor.numel():
        return 0
    flat = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    # Odd multipliers, which lose no bit modulo 2**64.
    weights = torch.arange(1, 2 * min(_CHUNK, len(flat)), 2, device=flat.device) * 0x9E3779B97F4A7C15 % 2**63 | 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in torch.split(flat, _CHUNK):
        total = total * 31 + (chunk.to(torch.int64) * weights[: len(chunk)]).sum()
    return int(total)
