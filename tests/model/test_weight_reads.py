"""Layers whose weights a model's code reads: adapted where they are read, or refused, and never wrong in silence."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRA,
    LoraConfig,
    TargetError,
    adapter_state_dict,
    add_adapter,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_lora.model.targets import modules_by_name
from lightning_lora.model.weight_reads import weight_reads


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Reads(nn.Module):
    """A block with a layer that it calls, reads, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InForward(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))


class InMethod(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        return x @ self.qkv.weight.to(x.dtype).t()


class Inherited(InForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Decorated(Reads):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.qkv.weight)


class InClosure(Reads):
    def forward(self, x: Tensor) -> Tensor:
        def project(y: Tensor) -> Tensor:
            return F.linear(y, self.qkv.weight)

        return self.out(project(x))


class CalledToo(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x)) @ self.qkv.weight


class CalledOrRead(Reads):
    slow = False

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.qkv.weight) if self.slow else self.qkv(x))


class Asks(Reads):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.qkv.weight, Tensor) and self.qkv.weight.dtype != torch.int8 and self.qkv.weight.shape:
            x = x.to(self.qkv.weight.device)
        return self.out(self.qkv(x))


READ_ONLY = [InForward, InMethod, Inherited, Decorated, InClosure]


def found(model: nn.Module) -> dict[str, tuple[str, bool]]:
    return {name: (read.reader, read.is_called) for name, (read,) in weight_reads(modules_by_name(model)).items()}


@pytest.mark.parametrize("cls", READ_ONLY)
def test_a_weight_that_is_read_alone_is_found(cls: type[Reads]) -> None:
    assert found(nn.Sequential(cls()))["0.qkv.weight"] == ("0", False)


@pytest.mark.parametrize("cls", [CalledToo, CalledOrRead])
def test_a_layer_that_is_called_too_is_told_apart(cls: type[Reads]) -> None:
    assert found(cls()) == {"qkv.weight": ("", True)}


def test_what_is_only_asked_about_is_not_read() -> None:
    assert found(Asks()) == {}


def train(model: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - x).pow(2).mean().backward()
        optimizer.step()
    return model(x).detach()


@settings(max_examples=60)
@given(
    cls=st.sampled_from([*READ_ONLY, CalledToo, CalledOrRead, Asks]),
    depth=st.integers(0, 2),
    how=st.sampled_from(["all-linear", "modules", "parameters"]),
    start=st.sampled_from([True, "pissa", "olora"]),
)
def test_what_is_trained_is_what_is_merged_or_it_is_refused(
    cls: type[Reads], depth: int, how: str, start: str | bool
) -> None:
    torch.manual_seed(0)
    model: nn.Module = cls().double()
    for _ in range(depth):
        model = nn.Sequential(model)
    path = "0." * depth
    chosen: dict[str, Any] = {
        "all-linear": {},
        "modules": {"target_modules": ["qkv", "out"]},
        "parameters": {"target_modules": ["out"], "target_parameters": [f"{path}qkv.weight"]},
    }[how]
    base, x = copy.deepcopy(model), torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    try:
        inject(model, LoraConfig(r=2, init_lora_weights=start, **chosen))
    except TargetError:
        assert cls in READ_ONLY or how == "parameters"
        assert how == "modules" or start is not True
        assert list(model.state_dict()) == list(base.state_dict()) and not hasattr(model, "lora")
        return
    try:
        torch.testing.assert_close(model(x), expected)
    except TargetError:
        assert cls is CalledToo and (how == "modules" or start is not True)
        return
    assert cls is not CalledToo or how != "modules"
    trained = train(model, x)
    assert any("qkv" in name and tensor.any() for name, tensor in adapter_state_dict(model).items() if "lora_B" in name)
    torch.testing.assert_close(merge(model)(x), trained)
    unmerge(model)
    torch.testing.assert_close(model(x), trained)
    assert not any("Lora" in type(module).__name__ for module in eject(model).modules())
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: model])
def test_it_comes_back_from_its_files(tmp_path: Any, wrap: Callable[..., nn.Module]) -> None:
    model, x = wrap(InForward()), torch.randn(4, 6)
    base = copy.deepcopy(model)
    inject(model, LoraConfig(r=2))
    trained = train(model, x)
    with pytest.warns(UserWarning, match=r"PEFT .* would leave out '.*qkv\.weight'"):
        save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(base, tmp_path)(x), trained)


def test_the_first_forward_alone_is_watched() -> None:
    model, x = CalledOrRead(), torch.randn(4, 6)
    inject(model, LoraConfig(r=2, target_modules=["qkv"]))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, copied):
        each(x)
        assert not any([*each._forward_hooks, *each._forward_pre_hooks, *each.qkv._forward_hooks])
    reads = inject(CalledOrRead(), LoraConfig(r=2, target_modules=["qkv"]))
    reads.slow = True
    with pytest.raises(
        TargetError, match=r'CalledOrRead computes with \'qkv.weight\'.*target_parameters=\["qkv.weight"\]'
    ):
        reads(x)
    plain = eject(inject(CalledOrRead(), LoraConfig(r=2, target_modules=["qkv"])))
    plain(x)
    assert not plain._forward_hooks and not plain.qkv._forward_hooks


def test_an_error_in_that_forward_is_the_one_that_is_seen() -> None:
    model = inject(CalledOrRead(), LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(4, 5))
    model(torch.randn(4, 6))


def test_dropout_leaves_the_call_alone() -> None:
    model, x = CalledOrRead(), torch.randn(4, 6)
    inject(model, LoraConfig(r=2, lora_dropout=0.5))
    assert set(adapter_state_dict(model)) >= {"qkv.lora.default.lora_A"}
    model(x)
    with pytest.raises(TargetError, match=r"'qkv\.weight'.*lora_dropout is not for parameters.*exclude_modules"):
        inject(InForward(), LoraConfig(r=2, lora_dropout=0.5))


def test_a_weight_that_two_read_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = InForward()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) @ self.one.qkv.weight

    with pytest.raises(TargetError, match=r"'one.qkv.weight' is read by '' and 'one'"):
        inject(Two(), LoraConfig(r=2))


def test_it_is_found_before_training(tmp_path: Any) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = CalledToo()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).pow(2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    before = copy.deepcopy(module.state_dict())
    trainer = toys.trainer(tmp_path, [LoRA(r=2, target_modules=["qkv"])], max_steps=2)
    with pytest.raises(TargetError, match=r"net\.qkv\.weight"):
        trainer.fit(module, DataLoader(torch.randn(4, 6)))
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())


def test_further_adapters_act_there_too() -> None:
    model, x = nn.Sequential(InForward()), torch.randn(4, 6)
    inject(model, LoraConfig(r=2))
    add_adapter(model, LoraConfig(r=3), "second")
    set_adapter(model, "second")
    trained = train(model, x)
    torch.testing.assert_close(merge(model)(x), trained)
    assert "0.lora.second.qkv_weight.lora_A" in model.state_dict()


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("model", [InForward, lambda: nn.MultiheadAttention(6, 2)])
def test_further_adapters_have_no_setting_that_the_first_cannot(
    model: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    adapted = inject(nn.Sequential(model()), LoraConfig(r=2))
    with pytest.raises(TargetError, match="not for"):
        add_adapter(adapted, LoraConfig(r=2, **settings), "second")


def test_several_layers_of_one_reader_are_watched() -> None:
    class Both(Reads):
        reads = False

        def forward(self, x: Tensor) -> Tensor:
            if self.reads:
                return F.linear(F.linear(x, self.qkv.weight), self.out.weight)
            return self.out(self.qkv(x))

    for reads in (False, True):
        model = inject(nn.Sequential(Both(), Both()), LoraConfig(r=2, target_modules=["qkv", "out"]))
        model[1].reads = reads
        if reads:
            with pytest.raises(TargetError, match=r"1\.qkv\.weight|1\.out\.weight"):
                model(torch.randn(4, 6))
        else:
            model(torch.randn(4, 6))
        assert not torch.overrides._get_current_function_mode_stack()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
