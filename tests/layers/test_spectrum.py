"""Spectra of updates without the updates, beside dense matrices in float64."""

import pytest
import torch
from helpers import toys
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoraConfig, inject
from lightning_lora.layers.spectrum import inner, singular_values
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
