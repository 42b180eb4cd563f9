"""What a finished run saves: its model is merged and plain, and so is the file."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.runs import fit
from helpers.toys import Toy, loader
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import CheckpointError, LoRA, load_adapter, save_adapter
from lightning_lora.formats.checkpoint import KEY


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("merge", ["last", "best"])
def test_a_finished_run_saves_the_merged_model(tmp_path: Path, merge: str, weights_only: bool) -> None:
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    model, trainer = fit(tmp_path, best, lora=LoRA(r=2, merge=merge))
    trainer.save_checkpoint(tmp_path / "finished.ckpt", weights_only=weights_only)
    saved = torch.load(tmp_path / "finished.ckpt", weights_only=True)
    toys.assert_same_tensors(saved["state_dict"], model.state_dict())
    assert saved[KEY]["merged"] and len(saved[KEY]["adapters"]) == 1 and not saved.get("optimizer_states")
    opened = Toy.load_from_checkpoint(tmp_path / "finished.ckpt")
    assert torch.equal(toys.outputs(opened), toys.outputs(model))
    # The adapter is where it was.
    assert KEY in torch.load(best.best_model_path, weights_only=False)
    load_adapter(Toy(), save_adapter(model, tmp_path / "adapter"))


def test_a_run_without_lora_goes_on_from_it(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    fresh = Toy()
    plain = toys.trainer(tmp_path, [], max_epochs=trainer.max_epochs + 1)
    plain.fit(fresh, loader(), loader(), ckpt_path=tmp_path / "finished.ckpt")
    assert plain.current_epoch == trainer.max_epochs + 1
    assert not torch.equal(toys.outputs(fresh), toys.outputs(model))


def test_a_run_with_lora_says_what_it_is(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    assert toys.outputs(Toy.load_from_checkpoint(tmp_path / "finished.ckpt")).isfinite().all()
    with pytest.raises(CheckpointError, match="the whole model of a finished run, with its adapters merged in"):
        toys.trainer(tmp_path, [LoRA(r=2)]).fit(Toy(), loader(), ckpt_path=tmp_path / "finished.ckpt")


def test_with_merge_none_the_adapter_is_saved(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, lora=LoRA(r=2, merge=None))
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    assert KEY in torch.load(tmp_path / "finished.ckpt", weights_only=False)


def test_a_second_run_saves_adapters_again(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "second.ckpt")

    model, _ = fit(tmp_path)
    base = toys.snapshot(Toy())
    fit(tmp_path, Saves(), model=model)
    toys.assert_adapter_only(tmp_path / "second.ckpt", base)
