"""Subclasses of nn.Linear: those that compute the same take the fast path, and others are adapted at the weight."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoraConfig, TargetError, eject, inject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.layers.linear import LoraLinear
from lightning_lora.layers.own_linear import LoraOwnLinear
from lightning_lora.model.state_dict import CheckpointError


class Same(nn.Linear):
    """As Falcon's, or diffusers' with its ``scale``."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out = scale * (x @ self.weight.T)
        return out if self.bias is None else out + self.bias


class Renamed(nn.Linear):
    pass


class Masked(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones(sizes[1], sizes[0]).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class Normalized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Scaled(nn.Linear):
    """An equalized learning rate."""

    gain = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * self.weight, self.bias)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Gated(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.full((sizes[1],), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * super().forward(x)


class Grouped(nn.Linear):
    """As DeepSeek-V4's: the weight is two, each for a half of the rows' groups."""

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.weight.chunk(2)
        return torch.cat([F.linear(x, one), F.linear(x.flip(-1), two)], -1)


PLAIN = [nn.Linear, Renamed, Same]
OWN = [Masked, Normalized, Scaled, Activated, Gated, Grouped]


class Model(nn.Module):
    def __init__(self, cls: type[nn.Linear]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.head = cls(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(x))


@settings(max_examples=40)
@given(
    cls=st.sampled_from([*PLAIN, *OWN]),
    start=st.sampled_from([True, False]),
    training=st.booleans(),
    on_meta=st.booleans(),
)
def test_what_is_trained_is_what_is_merged(cls: Any, start: bool, training: bool, on_meta: bool) -> None:
    model, x = Model(cls).double().train(training), torch.randn(5, 6, dtype=torch.float64)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    if on_meta:
        model = model.to("meta")
    inject(model, LoraConfig(r=2, init_lora_weights=start))
    assert isinstance(model.own, LoraLinear if cls in PLAIN else LoraOwnLinear)
    if on_meta:
        eject(model).to_empty(device="cpu").load_state_dict(state)
        inject(model, LoraConfig(r=2, init_lora_weights=start))
    if start:
        assert torch.equal(model(x), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    trained = model(x)
    assert not torch.allclose(trained, before)
    torch.testing.assert_close(merge(model)(x), trained)
    torch.testing.assert_close(unmerge(model)(x), trained)
    assert torch.equal(eject(model)(x), before)
    assert type(model.own) is cls


@pytest.mark.parametrize("cls", [Same, Masked])
def test_files_come_back(cls: Any, tmp_path: Path) -> None:
    model, x = inject(Model(cls), LoraConfig(r=2)), torch.randn(5, 6)
    toys.randomize(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(Model(cls), tmp_path)(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Model(cls), str(tmp_path))(x), model(x))


def test_an_adapter_of_peft_on_what_its_layer_returns(tmp_path: Path) -> None:
    for cls in (Same, Masked):
        theirs = peft.get_peft_model(Model(cls), peft.LoraConfig(r=2, target_modules=["own"]))
        theirs.save_pretrained(str(tmp_path / cls.__name__))
    load_adapter(Model(Same), tmp_path / "Same")
    model = Model(Masked)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"on the calls of 'own'.*Masked computes something else"):
        load_adapter(model, tmp_path / "Masked")
    toys.assert_same_tensors(model.state_dict(), before)


def test_a_trial_leaves_no_trace() -> None:
    class Draws(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + torch.rand(1)

    model = Model(Draws)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    inject(model, LoraConfig(r=2))
    assert isinstance(model.own, LoraOwnLinear) and model.own.calls == 0
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_settings_for_calls_alone_are_refused(setting: dict[str, Any]) -> None:
    inject(Model(Same), LoraConfig(r=2, **setting))
    with pytest.raises(TargetError, match=r"'weight' of 'own'.*Masked.*not for parameters that a module reads itself"):
        inject(Model(Masked), LoraConfig(r=2, **setting))
