"""Beside Lightning's weight averaging callbacks."""

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.toys import (
    Toy,
    assert_adapter_only,
    assert_same_tensors,
    base_of,
    loader,
    outputs,
    snapshot,
    toy_net,
    trainer,
)
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_lora import LoRA, adapter_state_dict, inject, unmerge
from lightning_lora.layers import LoraLayer

TARGETS = ["net.0", "net.4"]


class BuiltInConfigureModel(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = toy_net()


AVERAGING = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=1, annealing_epochs=2),
    "mean": WeightAveraging,
    "mean-parameters": lambda: WeightAveraging(use_buffers=False),
    "ema": lambda: EMAWeightAveraging(decay=0.7),
    "ema-multi": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.7)),
}


def lora(**settings: Any) -> LoRA:
    return LoRA(**({"r": 4, "target_modules": TARGETS, "summary": False} | settings))


class TrajectoryMean(Callback):
    """Averages the adapter after every step itself."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.seen.append({name: tensor.clone() for name, tensor in adapter_state_dict(pl_module).items()})

    def mean(self) -> dict[str, torch.Tensor]:
        return {name: torch.stack([seen[name] for seen in self.seen]).mean(0) for name in self.seen[0]}


@pytest.mark.parametrize("kind", AVERAGING)
def test_fit_checkpoint_and_merge(tmp_path: Path, kind: str) -> None:
    model = Toy()
    base, base_outputs = snapshot(model), outputs(model)
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=2, save_last=True)
    trainer(tmp_path, [lora(), AVERAGING[kind](), checkpoints], max_epochs=4).fit(model, loader(), loader())
    for path in tmp_path.glob("*.ckpt"):
        assert_adapter_only(path, base)
    merged = outputs(model)
    assert not torch.allclose(merged, base_outputs, atol=1e-3)
    unmerge(model)
    assert [name for name, module in model.named_modules() if isinstance(module, LoraLayer)] == TARGETS
    assert all(tensor.any() for tensor in adapter_state_dict(model).values())
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    assert_same_tensors(base_of(model, base), base)


def test_the_mean_is_that_of_the_adapters(tmp_path: Path) -> None:
    model, spy = Toy(), TrajectoryMean()
    trainer(tmp_path, [lora(merge=None), WeightAveraging(), spy]).fit(model, loader())
    assert len(spy.seen) == 8
    torch.testing.assert_close(adapter_state_dict(model), spy.mean())


@pytest.mark.parametrize("kind", AVERAGING)
def test_resume(tmp_path: Path, kind: str) -> None:
    def run(model: Toy, epochs: int, *more: Callback, **settings: Any) -> None:
        callbacks = [lora(), AVERAGING[kind](), *more]
        trainer(tmp_path, callbacks, max_epochs=4, limit_train_batches=4, **settings).fit(
            model, loader(), ckpt_path=tmp_path / "one.ckpt" if epochs else None
        )

    whole, resumed = Toy(), Toy()
    L.seed_everything(3, verbose=False)
    run(whole, 0, ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1))
    (tmp_path / "epoch=2.ckpt").rename(tmp_path / "one.ckpt")
    run(resumed, 3)
    assert_same_tensors(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_testing_a_checkpoint_uses_the_average(tmp_path: Path, kind: str) -> None:
    model = Toy()
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    the_trainer = trainer(tmp_path, [lora(), AVERAGING[kind](), checkpoints])
    the_trainer.fit(model, loader(), loader())
    (expected,) = the_trainer.test(model, loader(), verbose=False)
    fresh = Toy()
    (found,) = trainer(tmp_path, [lora()]).test(fresh, loader(), ckpt_path=checkpoints.last_model_path, verbose=False)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_model_built_in_configure_model(tmp_path: Path, kind: str) -> None:
    early, late = Toy(), BuiltInConfigureModel()
    for model in (early, late):
        L.seed_everything(3, verbose=False)
        trainer(tmp_path, [lora(), AVERAGING[kind]()]).fit(model, loader())
    assert_same_tensors(snapshot(late), snapshot(early))


@pytest.mark.parametrize("kind", AVERAGING)
def test_fit_again(tmp_path: Path, kind: str) -> None:
    model = Toy()
    base = snapshot(model)
    for _ in range(2):
        trainer(tmp_path, [lora(), AVERAGING[kind]()], max_epochs=3).fit(model, loader())
    unmerge(model)
    assert_same_tensors(base_of(model, base), base)


@pytest.mark.parametrize("kind", AVERAGING)
def test_averaging_before_lora(tmp_path: Path, kind: str) -> None:
    model = Toy()
    classes = [type(module) for module in model.modules()]
    averaging = AVERAGING[kind]()
    with pytest.raises(ValueError, match=rf"write callbacks=\[LoRA\(...\), {type(averaging).__name__}"):
        trainer(tmp_path, [averaging, lora()]).fit(model, loader())
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_swa_averages_and_adds_no_epoch_for_frozen_statistics(tmp_path: Path) -> None:
    model, spy, swa = Toy(), TrajectoryMean(), AVERAGING["swa"]()
    the_trainer = trainer(tmp_path, [lora(merge=None), swa, spy], max_epochs=4, limit_train_batches=1)
    start = adapter_state_dict(inject(Toy(), lora().config))
    the_trainer.fit(model, loader())
    assert the_trainer.current_epoch == 4 and the_trainer.global_step == 4
    spy.seen = [start, *spy.seen[:3]]  # it looks when epochs start
    torch.testing.assert_close(adapter_state_dict(model), spy.mean())
    pickle.dumps(swa.pl_module_contains_batch_norm)


def test_swa_with_frozen_and_trained_statistics(tmp_path: Path) -> None:
    class Both(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[2] = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU())

    with pytest.raises(ValueError, match=r"those that are trained \(the first is 'net.2.0'\).*use WeightAveraging"):
        trainer(tmp_path, [lora(modules_to_save=["net.2"]), AVERAGING["swa"]()]).fit(Both(), loader())
    trainer(tmp_path, [lora(modules_to_save=["net.1"]), AVERAGING["swa"]()]).fit(Toy(), loader())


def test_swa_with_a_model_built_in_configure_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="StochasticWeightAveraging.*__init__"):
        trainer(tmp_path, [lora(), AVERAGING["swa"]()]).fit(BuiltInConfigureModel(), loader())
