"""All values of a tensor in three numbers, by which two tensors can be compared that are not at hand together.

Two of them are sums of the values with random signs. How far these are apart tells how far the tensors are (Johnson and
Lindenstrauss): rounding moves them by as little as it moves the tensor, and one edited row by as much as it does.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_LENGTH, _ROWS = 1 << 16, 64  # of a row of signs; of how many rows one look is made, which bounds the temporaries
_MIX = (-0x61C8864680B583EB, -0x4B47D0C5A1A6E5B1)  # odd factors, of which the bits of a product look random


class Sketch(NamedTuple):
    """What is kept of a tensor.

    Attributes:
        one: The sum of its values with random signs.
        two: The same with others.
        norm: Its Euclidean norm.
    """

    one: float
    two: float
    norm: float

    def is_near(self, other: "Sketch", tolerance: float) -> bool:
        """Whether the tensors are apart by no more than about this share of their norm."""
        found, expected = np.array(self), np.array(other)
        if not (np.isfinite(found).all() and np.isfinite(expected).all()):
            return bool(np.array_equal(found, expected, equal_nan=True))
        return bool((np.abs(found - expected) <= tolerance * max(self.norm, other.norm)).all())


@torch.no_grad()
def sketch(tensor: Tensor) -> Sketch:
    """Look once at every value of a dense tensor of real numbers, where it is."""
    flat = tensor.detach().reshape(-1)
    if flat.is_meta or not flat.numel():
        return Sketch(0.0, 0.0, 0.0)
    signs = _signs().to(flat.device)
    total = torch.zeros(3, device=flat.device)
    for at in range(0, flat.numel(), _LENGTH * _ROWS):
        part = flat[at : at + _LENGTH * _ROWS].float()
        full = len(part) // _LENGTH
        for row, block in ((0, part[: full * _LENGTH].view(-1, _LENGTH)), (full, part[full * _LENGTH :].view(1, -1))):
            if block.numel():
                total = total + _look(block, signs, (at // _LENGTH + row) % (_LENGTH - _ROWS))
    one, two, square = total.tolist()
    return Sketch(one, two, math.sqrt(square))


def _look(block: Tensor, signs: Tensor, row: int) -> Tensor:
    """Sums of a matrix with the signs of its columns and of its rows, and of its squares."""
    rows, columns = block.shape
    sums = [((block * signs[:columns, which]).sum(1) * signs[row : row + rows, 2 + which]).sum() for which in (0, 1)]
    return torch.stack([*sums, torch.linalg.vector_norm(block) ** 2])


@cache
def _signs() -> Tensor:
    """Four columns of signs, the same on every machine."""
    numbers = torch.arange(1, _LENGTH + 1, dtype=torch.int64)
    for factor in _MIX:
        numbers = numbers * factor
        numbers = numbers ^ numbers.bitwise_right_shift(29)
    return torch.stack([numbers.bitwise_right_shift(bit).bitwise_and(1) * 2.0 - 1 for bit in (40, 41, 42, 43)], 1)
