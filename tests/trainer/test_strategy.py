"""What a Trainer saves and reads while there are adapters."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.runs import fit
from helpers.toys import Toy, assert_adapter_only, assert_same_tensors, inputs, loader, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lora import LoRA, adapter_state_dict, eject, load_from_checkpoint, unmerge
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


@pytest.mark.parametrize("when", ["during", "after, merged", "after, not merged"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_trainer_save_checkpoint(tmp_path: Path, when: str, weights_only: bool) -> None:
    base = snapshot(Toy())
    path = tmp_path / "own.ckpt"

    class Save(toys.L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(path, weights_only=weights_only)

    lora = LoRA(r=2, summary=False, merge="last" if when == "after, merged" else None)
    model, trainer = fit(tmp_path, *([Save()] if when == "during" else []), lora=lora, enable_checkpointing=False)
    if when != "during":
        trainer.save_checkpoint(path, weights_only=weights_only)
    assert_adapter_only(path, base)
    collected = trainer.strategy.lightning_module_state_dict()  # a sharded base must not even be gathered
    assert collected.keys() == torch.load(path, weights_only=True)["state_dict"].keys()
    out = unmerge(model).eval()(inputs())
    assert torch.equal(load_from_checkpoint(Toy, path).eval()(inputs()), out)


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


def test_a_strategy_without_the_seam_fails_loudly() -> None:
    class Changed:
        def save_checkpoint(self) -> None: ...

    with pytest.raises(RuntimeError, match="Changed has no lightning_module_state_dict, load_checkpoint"):
        install(Changed(), AdapterCheckpoints)
