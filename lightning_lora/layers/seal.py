"""Whether a tensor still has the values that it had."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # of which torch 2.13 has no public name

_CHUNK = 1 << 12  # words
_IN_CACHE, _AT_ONCE = 1 << 4, 1 << 8  # chunks that a CPU core's cache has room for with what is made of them; elsewhere
_HALF = 29
_HIGH = (1 << 64 - _HALF) - 1  # what a shift by so many bits leaves, without the sign
_FACTOR = -0x61C8864680B583EB  # odd, so that it loses no bit modulo 2**64


class Seal:
    """Put on a tensor, it tells later whether the tensor was changed since, in whatever way.

    A copy made with the tensor's own, by ``copy.deepcopy`` or ``pickle``, is a seal on that.

    Args:
        tensor: A parameter or buffer.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._dtype = tensor.dtype
        self._writes: int | None = writes(tensor)
        self._checksum = checksum(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self._tensor()
        if tensor is not None and self.fits(tensor):
            return Seal, (tensor,)  # whose copy has another count of writes, and may be cast
        return _broken, (self._dtype, self._checksum)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has the sealed values; after a cast, whether it was changed by autograd's count."""
        if tensor.dtype != self._dtype:
            return writes(tensor) == self._writes
        return checksum(tensor) == self._checksum


def _broken(dtype: torch.dtype, checksum: int) -> Seal:
    """A seal on a copy of a tensor that is not, or is not known to be, as it was sealed: its bytes alone can fit."""
    seal = Seal(torch.empty(0, dtype=dtype))
    seal._writes, seal._checksum = None, checksum
    return seal


def wraps_tensors(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, as a ``DTensor`` and quantized ones are."""
    return is_traceable_wrapper_subclass(tensor)


def writes(tensor: Tensor) -> int:
    """How often torch has counted a write to a tensor; not counted are those through ``.data``."""
    # torch has no public name for it, and tensors made in inference mode have none.
    return -1 if tensor.is_inference() else tensor._version


def checksum(tensor: Tensor) -> int:
    """See :func:`checksum_of`."""
    return 0 if tensor.is_meta else int(checksum_of(*words(tensor)))


@torch.no_grad()
def words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of a tensor's values, in their order, as whole numbers: eight at a time, and the rest one by one.

    Raises:
        RuntimeError: If the bytes of such a tensor cannot be seen.
    """
    tensor = tensor.detach()
    if is_traceable_wrapper_subclass(tensor):  # made of others, as quantized ones are
        names, _ = tensor.__tensor_flatten__()
        inner = [words(getattr(tensor, name)) for name in names]
        return torch.cat([eights for eights, _ in inner]), torch.cat([rest for _, rest in inner])
    tensor = tensor.int_repr() if tensor.is_quantized else tensor  # whose bytes torch 2.13 crashes to view
    read = tensor.contiguous().view(-1).view(torch.uint8)
    whole = len(read) // 8 * 8
    eights, rest = read[:whole], read[whole:]
    if eights.storage_offset() % 8 or eights.data_ptr() % 8:
        eights = eights.clone()
    return eights.view(torch.int64), rest.long()


@torch.no_grad()
def checksum_of(eights: Tensor, rest: Tensor) -> Tensor:
    """A number that another value or another order changes, but for one chance in 2**64, from :func:`words`.

    Returns:
        Shape ``()``, on their device.
    """
    weights = torch.arange(1, 2 * max(_CHUNK, len(rest)) + 1, 2, device=eights.device) * _FACTOR
    while len(eights) > 1:
        whole = len(eights) // _CHUNK * _CHUNK
        chunks = *torch.split(eights[:whole].view(-1, _CHUNK), _at_once(eights)), eights[whole:].view(1, -1)
        eights = torch.cat(_sums([some for some in chunks if some.numel()], weights))
    total = eights.sum()
    return total + 31 * (rest * weights[: len(rest)]).sum() if len(rest) else total


def _at_once(eights: Tensor) -> int:
    return _IN_CACHE * torch.get_num_threads() if eights.device.type == "cpu" else _AT_ONCE


def _sums(parts: list[Tensor], weights: Tensor) -> list[Tensor]:
    """A number of each row, made in one buffer for all parts."""
    buffer = torch.empty_like(parts[0])
    sums = []
    for part in parts:
        # Round numbers have their last bits zero, and products keep no more than the last ones.
        mixed = buffer[: len(part), : part.shape[1]]
        torch.bitwise_right_shift(part, _HALF, out=mixed).bitwise_and_(_HIGH).bitwise_xor_(part)
        sums.append(mixed.mul_(weights[: part.shape[1]]).sum(1))
    return sums
