"""The settings of the callback, and what it does at the ends of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.runs import fit
from helpers.toys import Toy, assert_adapter_only, assert_same_tensors, inputs, loader, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import CheckpointError, LoRA, LoraConfig, adapter_state_dict, inject, load_from_checkpoint


def test_settings_reach_the_config() -> None:
    assert LoRA(r=3, bias="all").config == LoraConfig(r=3, bias="all")
    config = LoraConfig(r=5)
    assert LoRA(config=config).config is config
    with pytest.raises(ValueError, match=r"LoraConfig in the place of r: pass it by its name, LoRA\(config="):
        LoRA(LoraConfig(r=2))
    with pytest.raises(ValueError, match="both a config and settings"):
        LoRA(r=3, config=config)
    with pytest.raises(ValueError, match="merge is 'first'"):
        LoRA(merge="first")


def test_best_is_merged_and_tested(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    model = Toy(lr=0.3)  # high, so that the last step is not the best
    model, trainer = fit(tmp_path, best, model=model, lora=LoRA(r=2, merge="best", summary=False), max_epochs=6)
    assert best.best_model_path
    merged = model.eval()(inputs())
    expected = load_from_checkpoint(Toy, best.best_model_path).eval()(inputs())
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    loss = trainer.test(model, loader(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(float(best.best_model_score), rel=1e-5)
    torch.testing.assert_close(model.eval()(inputs()), merged, rtol=1e-4, atol=1e-4)


def test_merging_the_best_needs_a_best(tmp_path: Path) -> None:
    lora = LoRA(r=2, merge="best", summary=False)
    with pytest.raises(ValueError, match="and it keeps none"):
        fit(tmp_path, lora=lora, enable_checkpointing=False)
    model = Toy()
    with pytest.raises(CheckpointError, match='merge="best" needs a best checkpoint'):
        fit(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss"), lora=lora, model=model, limit_val_batches=0)
    assert "lora" in dict(model.net[0].named_children())


def test_a_place_that_cannot_be_exported_to_is_found_out_early(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fit(tmp_path, lora=LoRA(r=2, export_dir=tmp_path / "file" / "export"), limit_train_batches=0)


def test_warm_start_from_a_checkpoint_and_from_a_directory(
    tmp_path: Path, adapter_checkpoint: tuple[Path, Any]
) -> None:
    from lightning_lora import save_adapter

    path, adapter = adapter_checkpoint
    save_adapter(load_from_checkpoint(Toy, path), tmp_path / "adapter")

    class Look(toys.L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            assert_same_tensors(adapter_state_dict(module), adapter)
            self.looked = True

    for source in (path, tmp_path / "adapter"):
        look = Look()
        _, trainer = fit(tmp_path, look, lora=LoRA(r=2, adapter=source, summary=False), max_epochs=1)
        assert look.looked
        assert trainer.global_step == 4
    with pytest.raises(CheckpointError, match=r"r \(2 saved, 3 here\)"):
        fit(tmp_path, lora=LoRA(r=3, adapter=path, summary=False))
    with pytest.raises(CheckpointError, match="scales the update of net.0 by 8"):
        fit(tmp_path, lora=LoRA(r=3, adapter=tmp_path / "adapter", summary=False))


def test_inject_by_hand_then_the_callback(tmp_path: Path) -> None:
    model = inject(Toy(), LoraConfig(r=2))
    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), model=model)
    assert_adapter_only(tmp_path / "last.ckpt", snapshot(Toy()))


def test_an_unknown_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module='backbone'.*own submodules are: net"):
        fit(tmp_path, lora=LoRA(module="backbone"))
