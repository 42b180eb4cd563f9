"""Spectra of updates without the updates, beside dense matrices in float64."""

import pytest
import torch
from helpers import toys
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoraConfig, inject
from lightning_lora.layers.spectrum import decomposed, inner, norm, singular_values, subspace_similarity
from lightning_lora.model.record import injections_of


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 6), st.integers(0, 99))
def test_those_of_the_product(r: int, inputs: int, outputs: int, zero: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, inputs, generator=generator, dtype=torch.float64)
    B = torch.randn(outputs, r, generator=generator, dtype=torch.float64)
    B[:, :zero] = 0  # components that are not used
    dense = torch.linalg.svdvals(B @ A)
    found = singular_values((A, B))
    assert found.shape == (r,)
    expected = torch.zeros(r, dtype=torch.float64)
    expected[: min(r, len(dense))] = dense[:r]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * (1 + float(dense[0])))
    other = torch.randn(r + 1, inputs, generator=generator), torch.randn(outputs, r + 1, generator=generator)
    product = (B @ A * (other[1].double() @ other[0].double())).sum()
    assert inner((A, B), other) == pytest.approx(float(product), rel=1e-6, abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 12), st.integers(0, 99))
def test_similarity_of_subspaces(r: int, s: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(rank, n, generator=generator) for rank in (r, s))
    phi = subspace_similarity(one, other)
    bases = [torch.linalg.svd(matrix.double())[2] for matrix in (one, other)]
    for i in range(1, r + 1):
        for j in range(1, s + 1):  # as equation 4 has it
            expected = (bases[0][:i] @ bases[1][:j].mT).norm() ** 2 / min(i, j)
            assert float(phi[i - 1, j - 1]) == pytest.approx(float(expected), abs=1e-9)
    itself = subspace_similarity(one, torch.randn(r, r, generator=generator) @ one)
    assert float(itself[-1, -1]) == pytest.approx(1, abs=1e-4)
    apart = torch.zeros(2, 2 * n), torch.zeros(2, 2 * n)
    apart[0][:, :2], apart[1][:, -2:] = torch.eye(2), torch.eye(2)
    assert not subspace_similarity(*apart).any()


@given(st.integers(1, 5), st.integers(5, 12), st.integers(5, 12), st.integers(0, 99))
def test_directions(r: int, inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)
    left, values, right = decomposed((A, B))
    torch.testing.assert_close(left * values @ right, B.double() @ A.double())
    for vectors in (left.mT, right):
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(r, dtype=torch.float64))
    torch.testing.assert_close(values, singular_values((A, B)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm((A, B)).double(), values.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Linear(6, 5), {}),
        (nn.Embedding(7, 5), {}),
        (nn.Conv2d(3, 5, 2), {"use_rslora": True}),
        (nn.Linear(6, 5), {"rank_pattern": {"0": 3}, "lora_alpha": 5}),
    ],
)
def test_each_kind_answers_for_itself(layer: nn.Module, settings: dict) -> None:
    model = inject(nn.Sequential(layer), LoraConfig(**{"r": 2, "target_modules": ["0"]} | settings))
    toys.randomize(model)
    ((_, adapted),) = injections_of(model)[0].layers()
    adapter = adapted.lora["default"]
    dense = torch.linalg.svdvals(adapter.delta_weight().detach().double().flatten(1))
    found = adapter.update_spectrum()
    torch.testing.assert_close(found, dense[: len(found)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_vera": True}])
def test_an_update_that_is_no_product(settings: dict) -> None:
    model = inject(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], **settings))
    ((_, adapted),) = injections_of(model)[0].layers()
    assert adapted.lora["default"].update_spectrum() is None
