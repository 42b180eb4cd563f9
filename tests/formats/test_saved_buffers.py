"""Buffers of modules that are trained in full: counts, masks and flags, of any type and value."""

from pathlib import Path

import peft
import pytest
import torch
from helpers import toys
from helpers.toys import toy_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import CheckpointError, LoraConfig, inject, load_adapter, save_adapter

CONFIG = LoraConfig(r=2, target_modules=["0", "4"], modules_to_save=["1"])
BUFFERS = st.one_of(
    st.lists(st.integers(-99, 99), max_size=4).map(torch.tensor).map(lambda t: t.to(torch.int16)),
    st.lists(st.booleans(), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.bool)),
    st.integers(0, 255).map(lambda value: torch.tensor(value, dtype=torch.uint8)),
    st.lists(st.floats(width=32), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    st.just(torch.tensor([1.0, -torch.inf, torch.nan])),
)


def net_with(buffers: dict[str, Tensor]) -> nn.Sequential:
    net = toy_net()
    for name, buffer in buffers.items():
        net[1].register_buffer(name, buffer.clone())
    return net


@given(buffers=st.dictionaries(st.sampled_from(["mask", "steps", "flag"]), BUFFERS))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_comes_back(buffers: dict[str, Tensor], tmp_path: Path) -> None:
    blank = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
    model = inject(net_with(blank), CONFIG)
    toys.randomize(model)
    for name, buffer in buffers.items():
        getattr(model[1], name).copy_(buffer)
    model[1].num_batches_tracked += 5
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(
        net_with({name: torch.zeros_like(buffer) for name, buffer in buffers.items()}), tmp_path / "adapter"
    )
    for name, tensor in model[1].state_dict().items():
        torch.testing.assert_close(loaded[1].state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(toys.outputs(loaded), toys.outputs(model), rtol=0, atol=0)


def test_those_of_peft(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(toy_net(), peft.LoraConfig(target_modules=["0", "4"], modules_to_save=["1"]))
    theirs(toys.inputs())
    theirs.eval().save_pretrained(tmp_path)
    loaded = load_adapter(toy_net(), tmp_path)
    assert loaded[1].num_batches_tracked == 8
    torch.testing.assert_close(toys.outputs(loaded), theirs(toys.inputs()))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_parameters_must_be_finite(tmp_path: Path, value: float) -> None:
    model = inject(toy_net(), CONFIG)
    model[1].weight.data[0] = value
    with pytest.raises(CheckpointError, match="NaN or an infinity"):
        save_adapter(model, tmp_path / "adapter")
    theirs = peft.get_peft_model(toy_net(), peft.LoraConfig(target_modules=["0", "4"], modules_to_save=["1"]))
    theirs.base_model.model[1].modules_to_save["default"].weight.data[0] = value
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = toy_net()
    with pytest.raises(CheckpointError, match=r"NaN or an infinity in '.*1\.weight'"):
        load_adapter(fresh, tmp_path / "theirs")
    assert [type(layer) for layer in fresh] == [type(layer) for layer in toy_net()]
