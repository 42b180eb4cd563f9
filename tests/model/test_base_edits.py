"""A base that was edited is told from the one that an adapter was trained on, by what was edited."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from helpers.toys import Toy, loader
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from lightning_lora import LoRA, LoraConfig, inject, load_adapter, save_adapter
from lightning_lora.model.base_config import changed_settings
from lightning_lora.model.sketch import _LENGTH, sketch
from lightning_lora.model.state_dict import CheckpointError

Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    toys.randomize(model)
    return save_adapter(model, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda m: m.model.embed_tokens.weight[7].normal_(), "model.embed_tokens.weight"),
        (lambda m: m.model.embed_tokens.weight[[1, 2]].copy_(m.model.embed_tokens.weight[[2, 1]]), None),
        (lambda m: m.model.embed_tokens.weight[1:3].copy_(m.model.embed_tokens.weight[1:3].flip(0)), "embed_tokens"),
        (lambda m: m.model.layers[0].mlp.up_proj.weight[3, 3].fill_(1e6), "model.layers.0.mlp.up_proj.weight"),
        (lambda m: m.model.layers[0].mlp.up_proj.weight[3, 3].fill_(float("nan")), "layers.0.mlp.up_proj"),
        (lambda m: m.model.layers[1].mlp.down_proj.weight[5].mul_(1.01), "layers.1.mlp.down_proj"),
        (lambda m: m.model.norm.weight[3].add_(0.01), "model.norm.weight"),
    ],
)
def test_one_value_or_row(edit: Edit, named: str | None, saved: Path) -> None:
    base = tiny_llama()
    with torch.no_grad():
        edit(base)
    if named is None:  # a copy was edited
        load_adapter(base, saved)
        return
    with pytest.raises(CheckpointError, match=f"not quite this one, .*{named}"):
        load_adapter(base, saved)


def other(**settings: Any) -> LlamaForCausalLM:
    config = copy.deepcopy(tiny_llama().config)
    for name, value in settings.items():
        setattr(config, name, value)
    model = LlamaForCausalLM(config)
    model.load_state_dict(tiny_llama().state_dict())
    return model


@pytest.mark.parametrize("changed", [{"hidden_act": "gelu"}, {"rms_norm_eps": 1e-3}])
def test_settings_that_change_the_function(changed: dict[str, Any], saved: Path) -> None:
    with pytest.raises(CheckpointError, match=f"other values in {next(iter(changed))} "):
        load_adapter(other(**changed), saved)


def test_positions_may_be_extended_and_that_is_said(saved: Path) -> None:
    with pytest.warns(UserWarning, match="other positions: rope_theta"):
        load_adapter(other(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), saved)


def test_the_same_base_in_another_precision(saved: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        load_adapter(tiny_llama().to(dtype), saved)


def test_a_checkpoint_and_a_buffer(tmp_path: Path) -> None:
    class Buffered(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(200.0))

    trainer = toys.trainer(tmp_path, [LoRA(r=2, merge=None, summary=False)], max_epochs=1)
    trainer.fit(Buffered(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load_adapter(Buffered(), tmp_path / "last.ckpt")
    edited = Buffered()
    edited.table[5] += 1
    for read in (
        lambda: load_adapter(edited, tmp_path / "last.ckpt"),
        lambda: toys.trainer(tmp_path, [LoRA(r=2)]).fit(edited, loader(), ckpt_path=tmp_path / "last.ckpt"),
    ):
        with pytest.raises(CheckpointError, match="'table'"):
            read()


def test_settings_of_another_version_are_left_alone() -> None:
    assert changed_settings({"a": 1, "gone": 2}, {"a": 1, "new": 3}) == []
    assert changed_settings({"a": {"b": 1.0}}, {"a": {"b": 2.0, "c": 0}}) == ["b (1.0 there, 2.0 here)"]


@given(st.integers(1, 3 * _LENGTH), st.data())
def test_a_sketch_tells_any_value(size: int, data: st.DataObject) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    before = sketch(values)
    assert abs(before.norm / float(values.norm()) - 1) < 1e-4
    noisy = values * (1 + 1e-7 * torch.randn(size, generator=torch.Generator().manual_seed(0)))
    assert before.is_near(sketch(noisy), 1e-5)
    values[data.draw(st.integers(0, size - 1))] += 5.0
    assert not before.is_near(sketch(values), 1e-5)


def test_a_sketch_of_what_is_not_finite() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    assert sketch(mask).is_near(sketch(mask.clone()), 1e-5)
    assert not sketch(mask).is_near(sketch(torch.zeros(2)), 1e-5)
    assert sketch(nn.Parameter(torch.empty(0))).norm == 0


def test_a_sketch_tells_where_values_are() -> None:
    values = torch.randn(3 * _LENGTH, generator=torch.Generator().manual_seed(1))
    moved = [values.roll(shift) for shift in (1, _LENGTH, 2 * _LENGTH)]
    assert not any(sketch(values).is_near(sketch(each), 1e-5) for each in moved)
