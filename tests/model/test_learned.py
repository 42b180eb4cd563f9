"""What adapters have learned, in figures."""

from typing import Any

import pytest
import torch
from helpers.toys import Toy, randomize

from lightning_lora import LoraConfig, inject
from lightning_lora.model.learned import Update, updates_of


def test_what_singular_values_say() -> None:
    assert Update("q", 4, None, [2.0, 2.0, 2.0, 2.0]).spectrum == pytest.approx((4.0, 2.0, 4.0, 4.0, 4))
    assert Update("q", 3, None, [3.0, 0.0, 0.0]).spectrum == pytest.approx((3.0, 3.0, 1.0, 1.0, 1))
    assert Update("q", 3, None, [0.0, 0.0, 0.0]).spectrum == (0, 0, 0, 0, 0)


def test_relative_norm() -> None:
    assert Update("q", 2, 10.0, [3.0, 4.0]).relative_norm == pytest.approx(0.5)
    assert Update("q", 2, None, [3.0, 4.0]).relative_norm is None


def test_updates_are_those_of_the_dense_ones() -> None:
    model: Any = inject(Toy(), LoraConfig(r=2, lora_alpha=6, target_modules=["net.0", "net.4"]))
    randomize(model)
    found = updates_of(model)
    assert [update.layer for update in found] == ["net.0", "net.4"]
    for update in found:
        layer = model.get_submodule(update.layer)
        values = torch.linalg.svdvals(layer.lora["default"].delta_weight().detach().double())[:2]
        assert update.values == pytest.approx(values.tolist(), rel=1e-4)
        assert update.weight_norm == pytest.approx(float(layer.weight.norm()), rel=1e-4)
        assert update.r == 2


def test_kinds_that_do_not_tell() -> None:
    model = inject(Toy(), LoraConfig(r=2, use_dora=True, target_modules=["net.4"]))
    assert updates_of(model) == []
