"""Whether a tensor still has the values that it had."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_lora.layers.seal import Seal, checksum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(2, 20_000),
    places=st.tuples(st.integers(0), st.integers(0)),
    value=st.sampled_from([1, 2, 0.5, -1, 2.0**-100, float("inf")]),
)
def test_round_numbers_that_change_places_are_a_change(
    dtype: torch.dtype, size: int, places: tuple[int, int], value: float
) -> None:
    one, other = (place % size for place in places)
    at_one, at_other = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    at_one[one] = at_other[other] = value
    if not dtype.is_floating_point:
        at_one, at_other = at_one.clamp(0, 2), at_other.clamp(0, 2)
    at_one, at_other = at_one.to(dtype), at_other.to(dtype)
    assert (checksum(at_one) == checksum(at_other)) == torch.equal(at_one, at_other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seal_fits_a_copy_in_any_layout_alone(dtype: torch.dtype) -> None:
    tensor = torch.randn(33, 7).to(dtype)
    seal = Seal(tensor)
    assert seal.fits(tensor.t().contiguous().t())
    for place in range(tensor.numel()):
        changed = copy.deepcopy(tensor)
        changed.view(-1)[place] = 0 if changed.view(-1)[place] else 1
        assert not seal.fits(changed)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_seals_the_copied_tensor(how: str, changed: bool) -> None:
    parameter = nn.Parameter(torch.randn(5))
    with torch.no_grad():
        parameter.add_(1)  # a write that the copy has not seen
        seal = Seal(parameter)
        parameter.add_(float(changed))
    pair = (parameter, seal)
    copied, its_seal = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert its_seal.fits(copied) == (not changed)
    copied.data = copied.data.half()
    assert its_seal.fits(copied) == (not changed)
    assert copy.deepcopy((copied, its_seal))[1].fits(copied) == (not changed)
    with torch.no_grad():
        copied.mul_(2)
    assert not its_seal.fits(copied)
