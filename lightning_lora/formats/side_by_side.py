"""Files of ``torch.save`` in which small tensors lie side by side.

Torch reads and writes each storage as a file of its own in the archive, which for a small tensor takes longer than its
bytes do, and an adapter with its moments is thousands of such. Here the small ones are parts of a few storages.
What ``torch.load`` gives is the same, in every version of torch and of Lightning: the same names, and tensors with the
same values and shapes, on the CPU.
"""

import itertools
import pickle
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

_SMALL = 1 << 20  # bytes, which take less time than a storage of their own
_ALIGNED = 64  # bytes
_PLAIN = (Tensor, nn.Parameter)
_PLACE = 5  # what torch says of a tensor beside its storage: offset, shape, stride, whether it has a gradient, hooks


def save(value: Any, file: IO[bytes]) -> None:
    """What ``torch.save`` does.

    Beside the tensors it takes the bytes of the small ones once more, on the CPU. Those of one entry of a dict have a
    storage for each dtype, so that tensors which are needed do not keep others in memory.
    """
    groups: list[dict[int, Tensor]] = []
    for entry in value.values() if isinstance(value, dict) else [value]:
        known = {key for group in groups for key in group}
        groups.append({id(tensor): tensor for tensor in _tensors_in(entry) if id(tensor) not in known})
    shared = _overlapping([tensor for group in groups for tensor in group.values()])
    reduced = {key: reduction for group in groups for key, reduction in _laid_out(group.values(), shared)}

    class Pickler(pickle.Pickler):
        def reducer_override(self, found: Any) -> Any:
            return reduced.get(id(found), NotImplemented)

    # All that torch uses of a module that is given so.
    torch.save(value, file, pickle_module=SimpleNamespace(Pickler=Pickler, __name__=pickle.__name__))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors in containers; in other objects, they are left as they are."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            if type(each) in _PLAIN and each.layout is torch.strided and not (each.is_nested or each.is_meta):
                yield each
        elif isinstance(each, (dict, list, tuple)) and id(each) not in seen:
            seen.add(id(each))  # for one may hold itself
            waiting.extend(each.values() if isinstance(each, dict) else each)


def _overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """By identity, the tensors that share memory with another, as they shall when they are read."""
    found: set[int] = set()
    last = _Span("", 0, 0, 0)
    for span in sorted(_Span.of(tensor) for tensor in tensors if tensor.numel()):
        if span.device == last.device and span.start < last.end:
            found |= {span.key, last.key}
        if span.device != last.device or span.end > last.end:
            last = span
    return found


class _Span(NamedTuple):
    """Where the memory of a tensor begins and ends; of one that has gaps, that of its storage."""

    device: str
    start: int
    end: int
    key: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Span":
        storage = tensor.untyped_storage()
        whole = (storage.data_ptr(), storage.nbytes())
        start, size = (tensor.data_ptr(), tensor.nbytes) if tensor.is_contiguous() else whole
        return cls(str(tensor.device), start, start + size, id(tensor))


def _laid_out(tensors: Iterable[Tensor], shared: set[int]) -> Iterator[tuple[int, Any]]:
    """By identity of small tensors, how they are pickled as parts of one storage."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if _is_small(tensor) and id(tensor) not in shared:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    tuples: dict[tuple[int, ...], tuple[int, ...]] = {}  # of which a pickle has equal ones once
    for dtype, group in by_dtype.items():
        ends = [*itertools.accumulate(_room(tensor) for tensor in group)]
        flat = torch.zeros(ends[-1], dtype=dtype, device="cpu")
        # How torch pickles a tensor: with its storage, then where it is in it, and last whether it has a gradient and
        # its hooks, of which a new tensor has none.
        rebuild, (storage, *rest) = flat.__reduce_ex__(2)  # type: ignore[no-untyped-call]
        if len(rest) != _PLACE:  # more is said of types whose storages have none, such as float8
            continue
        for tensor, offset in zip(group, [0, *ends]):
            flat[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
            shape, stride = tuple(tensor.shape), tensor.stride()
            where = (offset, tuples.setdefault(shape, shape), tuples.setdefault(stride, stride))
            yield id(tensor), (rebuild, (storage, *where, False, None))


def _room(tensor: Tensor) -> int:
    """How many numbers' places a tensor takes, so that the next one begins where torch would have a tensor begin."""
    step = max(1, _ALIGNED // tensor.element_size())
    return -(-tensor.numel() // step) * step


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor is no more than a few numbers in a row.

    Whole numbers are not among them: torch takes the state of a random generator from the beginning of its storage.
    """
    is_more = vars(tensor) or tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    is_plain = type(tensor) is Tensor and not is_more and tensor.is_contiguous()
    return is_plain and tensor.dtype.is_floating_point and 0 < tensor.nbytes <= _SMALL
