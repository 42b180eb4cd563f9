"""What a Trainer saves and reads while there are adapters."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from helpers import toys
from helpers.runs import fit
from helpers.toys import Toy, assert_adapter_only, assert_same_tensors, inputs, loader, outputs, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from lightning_lora import (
    CheckpointError,
    LoRA,
    adapter_state_dict,
    eject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    unmerge,
)
from lightning_lora.model import state_dict
from lightning_lora.trainer.strategy import AdapterCheckpoints, install


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_train_steps": 1, "save_top_k": -1},
        {"save_last": True},
        {"save_weights_only": True, "save_last": True},
        {"monitor": "val_loss", "save_top_k": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_model_checkpoint_holds_the_adapter_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = snapshot(Toy())
    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, **settings))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert_adapter_only(checkpoint, base)
        assert checkpoint["state_dict"].keys() == adapter_state_dict(unmerge(model)).keys()
        assert ("optimizer_states" not in checkpoint) == bool(settings.get("save_weights_only"))
        assert set(checkpoint["lightning_lora"]["adapters"][0]) >= {"config", "base_fingerprint", "adapter_name"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_adapter_and_moments_are_a_storage_each(tmp_path: Path, asynchronous: bool) -> None:
    plugins = [AsyncCheckpointIO()] if asynchronous else None
    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), lora=LoRA(r=2, merge=None), plugins=plugins)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    moments = [value for entries in optimizer["state"].values() for value in entries.values()]
    for tensors in (list(checkpoint["state_dict"].values()), moments):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1 < len(tensors)
    assert_same_tensors(checkpoint["state_dict"], adapter_state_dict(model))


def test_a_model_is_looked_through_once_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once more for each question that is asked of its names."""
    model, trainer = fit(tmp_path, lora=LoRA(r=2, merge=None))
    looks = []
    look = state_dict._find_owners
    monkeypatch.setattr(state_dict, "_find_owners", lambda model: looks.append(model) or look(model))
    trainer.save_checkpoint(tmp_path / "once.ckpt")
    assert len(looks) == 1
    trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(tmp_path / "once.ckpt"))
    assert len(looks) == 3
    with state_dict.steady(model), state_dict.steady(model):
        assert list(state_dict.adapter_tensors(model)) == list(adapter_state_dict(model))
    assert len(looks) == 4
    eject(model)
    assert not state_dict.adapter_tensors(model)


@pytest.mark.parametrize("when", ["during", "after, not merged"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_trainer_save_checkpoint(tmp_path: Path, when: str, weights_only: bool) -> None:
    base = snapshot(Toy())
    path = tmp_path / "own.ckpt"

    class Save(toys.L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(path, weights_only=weights_only)

    lora = LoRA(r=2, summary=False, merge=None)
    model, trainer = fit(tmp_path, *([Save()] if when == "during" else []), lora=lora, enable_checkpointing=False)
    if when != "during":
        trainer.save_checkpoint(path, weights_only=weights_only)
    assert_adapter_only(path, base)
    out = unmerge(model).eval()(inputs())
    assert torch.equal(load_from_checkpoint(Toy, path).eval()(inputs()), out)


class OfItsNet(Toy):
    """Its state is that of its network, so that others can load it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict(state_dict, strict, assign)


class Renamed(Toy):
    """Its files have old names of its network, by hooks of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.net.register_state_dict_post_hook(self._to_old)
        self.net.register_load_state_dict_pre_hook(self._to_new)

    @staticmethod
    def _to_old(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}old.{name.removeprefix(prefix)}"] = state_dict.pop(name)

    @staticmethod
    def _to_new(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}old.")]:
            state_dict[prefix + name.removeprefix(f"{prefix}old.")] = state_dict.pop(name)


class WithoutPrefix(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name.removeprefix("net."): v for name, v in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"net.{name}": value for name, value in checkpoint["state_dict"].items()}


class TakesOut(Toy):
    """What need not be saved is taken out by name, and put in again."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, _ in toys.toy_net().named_parameters():
            del checkpoint["state_dict"][f"net.{name}"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint["state_dict"]
        assert all(state_dict.pop(f"net.{name}").shape == p.shape for name, p in toys.toy_net().named_parameters())
        state_dict.update({f"net.{name}": value for name, value in toys.toy_net().state_dict().items()})


class Trained(Toy):
    """Only what trains is a part of its state."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}


WAYS = [(way, saved) for way in (OfItsNet, Renamed, WithoutPrefix, Trained) for saved in (None, ["6"], ["1", "6"])]


@pytest.mark.parametrize(("module_class", "saved"), [(TakesOut, None), *WAYS])
def test_modules_that_save_and_load_in_ways_of_their_own(tmp_path: Path, module_class: Any, saved: Any) -> None:
    """Files are as those of any module, resume with the same bits, and are opened by all that opens such files."""
    target = {"target_modules": ["net.0", "net.4"], "modules_to_save": saved and [f"net.{name}" for name in saved]}
    names, outs = [], []
    for cls in (Toy, module_class):
        path = tmp_path / cls.__name__
        torch.manual_seed(0)
        kept = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        model, _ = fit(path, kept, model=cls(), lora=LoRA(r=2, summary=False, merge=None, **target))
        assert_adapter_only(path / "epoch=1.ckpt", snapshot(Toy()))
        names.append(torch.load(path / "epoch=1.ckpt", weights_only=True)["state_dict"].keys())
        outs.append(outputs(model))
        resumed = cls()
        lora = LoRA(r=2, summary=False, merge=None, **target)
        toys.trainer(path, [lora]).fit(resumed, loader(), loader(), ckpt_path=path / "epoch=0.ckpt")
        outs += [outputs(resumed), outputs(load_adapter(cls(), path / "epoch=1.ckpt"))]
        if cls is not TakesOut:  # whose hook asks for what is in no file
            outs.append(outputs(load_from_checkpoint(cls, path / "epoch=1.ckpt")))
    assert names[0] == names[1]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not torch.equal(outs[0], outputs(Toy()))


def test_checkpoint_on_an_exception(tmp_path: Path) -> None:
    class Fails(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 5:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, ModelCheckpoint(tmp_path, save_on_exception=True), OnExceptionCheckpoint(tmp_path), model=model)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) >= 2
    for file in files:
        assert_adapter_only(file, snapshot(Toy()))


def test_asynchronous_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), plugins=[AsyncCheckpointIO()])
    assert_adapter_only(tmp_path / "last.ckpt", snapshot(Toy()))


def test_size_is_that_of_adapter_and_moments(tmp_path: Path) -> None:
    class Wide(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[4] = torch.nn.Sequential(torch.nn.Linear(16, 4096), torch.nn.Linear(4096, 16))

    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), model=Wide(), lora=LoRA(r=8, summary=False))
    adapter = sum(t.numel() * t.element_size() for t in adapter_state_dict(unmerge(model)).values())
    size = os.path.getsize(tmp_path / "last.ckpt")
    assert 3 * adapter <= size <= 1.02 * 3 * adapter + 64 * 1024


def test_a_run_with_a_module_of_its_own_keeps_the_rest(tmp_path: Path) -> None:
    model, _ = fit(
        tmp_path,
        ModelCheckpoint(tmp_path, save_last=True),
        lora=LoRA(r=2, module="net.0", summary=False),
    )
    keys = set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert keys == {"net.0.lora.default.lora_A", "net.0.lora.default.lora_B"} | {
        name for name in Toy().state_dict() if not name.startswith("net.0.")
    }
    rebuilt = load_from_checkpoint(Toy, tmp_path / "last.ckpt")
    assert torch.equal(rebuilt.eval()(inputs()), unmerge(model).eval()(inputs()))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_from_a_checkpoint_on_the_untouched_base(
    tmp_path: Path, adapter_checkpoint: tuple[Path, dict[str, torch.Tensor]], stage: str
) -> None:
    path, adapter = adapter_checkpoint
    model = Toy()
    base = snapshot(model)
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False)])
    result = getattr(trainer, stage)(model, loader(), ckpt_path=path)
    assert_same_tensors(adapter_state_dict(model), adapter)
    if stage == "predict":
        expected = load_from_checkpoint(Toy, path).eval()(inputs())
        torch.testing.assert_close(torch.cat(result), expected)
    assert_same_tensors(eject(model).state_dict(), base)


class Extra(nn.Module):
    """Stores what is no tensor."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return {"amax": self.state}

    def set_extra_state(self, state: Any) -> None:
        self.state = state["amax"]


class Lazy(nn.Module):
    """Makes its buffer when it is first used, or loaded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.zeros(()))
        self.seen += len(x)
        return x

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}seen" in state_dict:
            self.register_buffer("seen", torch.zeros(()))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Beside(Toy):
    """Has much beside ``net``."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.lazy, self.judge = Extra(), Lazy(), nn.Linear(2, 2)
        self.auroc = torchmetrics.classification.BinaryAUROC()
        self.auroc.persistent(True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.extra.state = self.global_step
        self.auroc.update(torch.rand(3), torch.tensor([0, 1, 1]))
        self.lazy(batch[0])
        return super().training_step(batch, batch_idx)


class Drops(Beside):
    """Keeps a part out of its checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("judge")]:
            del checkpoint["state_dict"][name]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_beside_is_loaded_as_without_lora(lora: bool, strict: bool, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [LoRA(r=2, module="net", summary=False)] if lora else []

    def build(cls: type[Beside] = Beside) -> Beside:
        model = cls()
        model.strict_loading = strict
        return model

    for cls in (Beside, Drops):
        last = tmp_path / cls.__name__ / "last.ckpt"
        toys.trainer(tmp_path, [*callbacks(), ModelCheckpoint(last.parent, save_last=True)]).fit(build(cls), loader())
        model, trainer = build(cls), toys.trainer(tmp_path, callbacks(), max_epochs=3)
        if strict and cls is Drops:
            with pytest.raises(
                RuntimeError, match=r"Missing key\(s\) in state_dict: \"judge.weight\", \"judge.bias\"\. *$"
            ):
                trainer.fit(model, loader(), ckpt_path=last)
        else:
            trainer.fit(model, loader(), ckpt_path=last)
            assert model.extra.state == 11
            assert model.lazy.seen == 96
            assert len(model.auroc.preds) == 12
    if lora:
        rebuilt = load_from_checkpoint(Beside, tmp_path / "Beside" / "last.ckpt", strict=strict)
        assert rebuilt.extra.state == 7
        assert rebuilt.lazy.seen == 64
        with pytest.raises(RuntimeError, match="judge.weight"):
            load_from_checkpoint(Drops, tmp_path / "Drops" / "last.ckpt", strict=True)
        assert load_from_checkpoint(Drops, tmp_path / "Drops" / "last.ckpt", strict=False).strict_loading


@pytest.mark.parametrize("strict", [False, True])
def test_adapters_are_always_required(strict: bool, tmp_path: Path) -> None:
    def lora() -> LoRA:
        return LoRA(r=2, module="net", summary=False)

    toys.trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path, save_last=True)]).fit(Beside(), loader())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["state_dict"]["net.0.lora.default.lora_B"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    model = Beside()
    model.strict_loading = strict
    with pytest.raises(CheckpointError, match=r"missing: net\.0\.lora\.default\.lora_B"):
        toys.trainer(tmp_path, [lora()], max_epochs=3).fit(model, loader(), ckpt_path=tmp_path / "last.ckpt")


class Aliased(Toy):
    """Parts of ``net`` have other names too, as modules and as a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = self.net, self.net[6]
        self.tied = nn.Linear(16, 16)
        nn.init.zeros_(self.tied.bias)
        self.tied.weight = self.net[4].weight


@pytest.mark.parametrize("module", ["net", "encoder", None])
def test_other_names_of_the_base_are_in_no_checkpoint(module: str | None, tmp_path: Path) -> None:
    settings = {"r": 2, "module": module, "target_modules": ["0", "4"], "modules_to_save": ["6"], "summary": False}
    if module is None:
        settings.update(target_modules=["net.0", "net.4"], modules_to_save=["net.6"])

    def lora() -> LoRA:
        return LoRA(**settings)

    model, last = Aliased(), tmp_path / "last.ckpt"
    trainer = toys.trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(model, loader())
    names = torch.load(last, weights_only=True)["state_dict"]
    of_others = {name for name in names if ".lora." not in name and not name.endswith(("6.weight", "6.bias"))}
    assert {name for name in of_others if not name.startswith("head.")} == ({"tied.bias"} if module else set())
    other = load_from_checkpoint(Aliased, last)
    torch.testing.assert_close(outputs(other), outputs(model), rtol=1e-4, atol=1e-5)
    assert other.encoder is other.net
    assert other.head.weight is other.net[6].weight
    resumed = toys.trainer(tmp_path, [lora()], max_epochs=3)
    resumed.fit(Aliased(), loader(), ckpt_path=last)
    assert resumed.global_step == 12
    save_adapter(other, tmp_path / "adapter")
    again = Aliased()
    load_adapter(again.net if module else again, tmp_path / "adapter")
    assert torch.equal(outputs(again), outputs(other))


def test_a_strategy_without_the_seam_fails_loudly() -> None:
    class Changed:
        def save_checkpoint(self) -> None: ...

    with pytest.raises(RuntimeError, match="Changed has no lightning_module_state_dict, load_checkpoint"):
        install(Changed(), AdapterCheckpoints)
