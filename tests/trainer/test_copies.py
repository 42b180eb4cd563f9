"""Copies of the module and of the Trainer, made in a run and after it, and networks that outlive their module."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.toys import Toy, assert_same_tensors, base_of, loader, outputs, snapshot, toy_net, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRA, adapters, eject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.layers import LoraLayer


def lora(**given: Any) -> LoRA:
    return LoRA(**({"r": 2, "summary": False} | given))


def _saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved,
}


class Late(Toy):
    """Built when Lightning asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.built = 0

    def configure_model(self) -> None:
        self.built += 1
        if isinstance(self.net, nn.Identity):
            self.net = toy_net(0, 0.1)


class Keep(L.Callback):
    """Copies the module while it trains."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.how != "deepcopy":
            pl_module._trainer = None
        self.kept = HOW[self.how](pl_module)
        pl_module._trainer = trainer


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("module_class", [Toy, Late])
def test_a_copy_made_in_fit_is_a_copy(tmp_path: Path, how: str, module_class: type[Toy]) -> None:
    model, keep = module_class(), Keep(how)
    trainer(tmp_path, [lora(), keep], max_epochs=1).fit(model, loader())
    twin, merged = keep.kept, snapshot(model)
    twin._trainer = None
    built = getattr(model, "built", 0)
    adapted = outputs(twin)
    assert is_adapted(twin)
    torch.testing.assert_close(adapted, outputs(model), rtol=1e-4, atol=1e-5)
    merge(twin)
    trainer(tmp_path).test(twin, loader(), verbose=False)
    assert twin.net[0].merged
    unmerge(twin)
    for callbacks in ([], [lora()]):
        the_trainer = trainer(tmp_path, callbacks)
        for run in (the_trainer.validate, the_trainer.test):
            run(twin, loader(), verbose=False)
        assert is_adapted(twin)
        assert torch.equal(outputs(twin), adapted)
    assert not is_adapted(model)
    assert_same_tensors(snapshot(model), merged)
    assert getattr(model, "built", 0) == built
    if module_class is Late:
        assert twin.built == built + 5
    trainer(tmp_path, [lora()], max_epochs=1).fit(twin, loader())
    assert not is_adapted(twin)
    assert_same_tensors(snapshot(model), merged)
    assert_same_tensors(base_of(unmerge(twin), snapshot(Toy())), base_of(unmerge(model), snapshot(Toy())))


def test_a_configure_model_of_the_object_stays(tmp_path: Path) -> None:
    model, called = Toy(), []
    own = model.__dict__["configure_model"] = lambda: called.append(1)
    trainer(tmp_path, [lora()], max_epochs=1).fit(model, loader())
    assert called
    assert vars(model)["configure_model"] is own
    assert adapters(unmerge(model))


@pytest.mark.parametrize("merge", ["last", None])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_trainer_can_be_pickled_and_goes_on(tmp_path: Path, merge: str | None, checkpoints: bool) -> None:
    callbacks = [lora(merge=merge), *([ModelCheckpoint(tmp_path)] if checkpoints else [])]
    model, first = Toy(), trainer(tmp_path, callbacks, max_epochs=1, enable_checkpointing=checkpoints)
    first.fit(model, loader())
    (losses,) = first.test(model, loader(), verbose=False)
    before = outputs(model)
    twin = pickle.loads(pickle.dumps(first))
    assert type(twin.strategy) is type(first.strategy)
    assert type(twin.strategy.checkpoint_io) is type(first.strategy.checkpoint_io)
    copied = twin.lightning_module
    assert copied is not model
    torch.testing.assert_close(outputs(copied), before)
    assert twin.test(copied, loader(), verbose=False) == [losses]
    assert twin.test(model, loader(), verbose=False) == [losses]
    assert is_adapted(model) == (merge is None)
    assert torch.equal(outputs(model), before)
    assert type(copy.deepcopy(first.strategy)) is type(first.strategy)


class TwoNets(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = self.net, toy_net(1)
        del self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


CALLBACKS: dict[str, tuple[type[Toy], list[dict[str, Any]]]] = {
    "one": (Toy, [{}]),
    "two": (Toy, [{"target_modules": ["net.0"]}, {"target_modules": ["net.4"]}]),
    "module": (TwoNets, [{"module": "left"}]),
    "two modules": (TwoNets, [{"module": "left"}, {"module": "right"}]),
}


@pytest.mark.parametrize("case", CALLBACKS)
@pytest.mark.parametrize("by_hand", ["merge", "eject"])
def test_what_is_merged_by_hand_is_merged_after_each_stage(tmp_path: Path, case: str, by_hand: str) -> None:
    module_class, settings = CALLBACKS[case]
    model = module_class()
    callbacks = [lora(merge=None, **given) for given in settings]
    the_trainer = trainer(tmp_path, callbacks, max_epochs=1)
    the_trainer.fit(model, loader())
    adapted = outputs(model)
    if by_hand == "merge":
        merge(model)
    else:
        eject(model, merge=True)
    merged = snapshot(model)
    for run in ("test", "validate", "predict"):
        for each in (the_trainer, trainer(tmp_path, [lora(merge=None, **given) for given in settings])):
            getattr(each, run)(model, loader())
            assert_same_tensors(snapshot(model), merged)
            assert is_adapted(model) == (by_hand == "merge")
    torch.testing.assert_close(outputs(unmerge(model)), adapted)


class Plan(Toy):
    """Made for one run around a network that lives on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("how", ["last", None])
def test_a_network_outlives_the_module_of_its_run(tmp_path: Path, how: str | None, is_gone: bool) -> None:
    net = toy_net(dropout=0.0)
    base, kept = snapshot(net), []

    def fit_plan() -> None:
        plan = Plan(net)
        the_trainer = trainer(tmp_path, [lora(merge=how)], max_epochs=1)
        the_trainer.fit(plan, loader())
        if not is_gone:
            kept.append(the_trainer)

    def fit() -> None:
        fit_plan()
        gc.collect()  # a Trainer and its module hold each other

    fit()
    first = outputs(net)
    torch.testing.assert_close(outputs(unmerge(net)), first, rtol=1e-4, atol=1e-5)
    save_adapter(net, tmp_path / "adapter")
    torch.testing.assert_close(outputs(load_adapter(toy_net(), tmp_path / "adapter")), first, rtol=1e-4, atol=1e-5)
    merge(net)
    fit()  # goes on with the same adapter
    assert not torch.allclose(outputs(net), first)
    eject(unmerge(net))
    assert_same_tensors(snapshot(net), base)
    fit()
    torch.testing.assert_close(outputs(net), first, rtol=1e-4, atol=1e-5)


class Fails(L.Callback):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise RuntimeError("no start")


@pytest.mark.parametrize("how", ["last", None])
def test_a_start_that_fails_takes_out_no_adapter_of_an_earlier_module(tmp_path: Path, how: str | None) -> None:
    net = toy_net(dropout=0.0)
    first = trainer(tmp_path, [lora(merge=how)], max_epochs=1)
    first.fit(Plan(net), loader())
    state = snapshot(net)
    with pytest.raises(RuntimeError, match="no start"):
        trainer(tmp_path, [Fails(), lora(merge=how)], max_epochs=1).fit(Plan(net), loader())
    assert_same_tensors(snapshot(net), state)
    assert adapters(unmerge(net))
