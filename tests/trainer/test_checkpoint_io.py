"""Checkpoints that a ``CheckpointIO`` of the user's own writes, or that are on another file system."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from helpers import toys
from helpers.toys import Toy, assert_adapter_only, loader, snapshot
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_lora import LoRA, adapter_state_dict, load_adapter, load_from_checkpoint


class Nowhere(CheckpointIO):
    """Keeps checkpoints in memory, and leaves no file."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.kept[str(path)] = buffer.getvalue()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(io.BytesIO(self.kept[str(path)]), weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        del self.kept[str(path)]


class OtherName(TorchCheckpointIO):
    """Writes what no other can read, under another name."""

    @staticmethod
    def _file(path: Any) -> Path:
        return Path(f"{path}.secret")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self._file(path).parent.mkdir(parents=True, exist_ok=True)
        self._file(path).write_bytes(bytes(byte ^ 0x55 for byte in buffer.getvalue()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content = bytes(byte ^ 0x55 for byte in self._file(path).read_bytes())
        return torch.load(io.BytesIO(content), weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        self._file(path).unlink()


class SamePath(OtherName):
    """Writes it under the very name."""

    @staticmethod
    def _file(path: Any) -> Path:
        return Path(path)


class Slow(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)
        super().save_checkpoint(*args, **kwargs)


class SlowTorch(TorchCheckpointIO):
    """As Lightning's own on a slow disk, by its very name."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)
        super().save_checkpoint(*args, **kwargs)


SlowTorch.__name__ = "TorchCheckpointIO"

OWN: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "nowhere": lambda: [Nowhere()],
    "other name": lambda: [OtherName()],
    "same path": lambda: [SamePath()],
    "async": lambda: [AsyncCheckpointIO(SlowTorch())],
    "async of a subclass": lambda: [AsyncCheckpointIO(Slow())],
    "async of another": lambda: [AsyncCheckpointIO(OtherName())],
}


class Curve(Toy):
    """Its best validation is that of the second of four epochs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(abs(self.current_epoch - 1)))


def fit(
    folder: str, plugins: list[Any], max_epochs: int = 4, ckpt_path: str | None = None, merge: str | None = "best"
) -> tuple[Toy, Any, ModelCheckpoint]:
    torch.manual_seed(5)
    model = Curve()
    keep = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    lora = LoRA(r=2, lora_dropout=0.2, summary=False, merge=merge)
    trainer = toys.trainer("unused", [lora, keep], plugins=plugins, max_epochs=max_epochs)
    trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return model, trainer, keep


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("plain"))
    best, _, keep = fit(folder, [])
    last, _, _ = fit(f"{folder}/last", [], merge=None)
    saved = torch.load(keep.best_model_path, weights_only=True)
    return {"best": snapshot(best), "last": snapshot(last), "saved": saved["state_dict"]}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_saves_merges_the_best_and_resumes(
    name: str, where: str, tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if where == "memory" and name in ("other name", "same path", "async of another"):
        pytest.skip("writes local files by itself")
    folder = str(tmp_path / "kept") if where == "local" else f"memory://{tmp_path.name}"
    plugins = OWN[name]()
    best, _, keep = fit(folder, plugins)
    toys.assert_same_tensors(snapshot(best), uninterrupted["best"])
    assert "epoch=1" in keep.best_model_path
    for part in (plugins, plugins or OWN[name]()):  # the same again, as a later run would be given it
        fit(f"{folder}/part", part, max_epochs=2, merge=None)
        model, trainer, _ = fit(f"{folder}/part", part, ckpt_path=f"{folder}/part/last.ckpt", merge=None)
        toys.assert_same_tensors(snapshot(model), uninterrupted["last"])
    trainer.save_checkpoint(f"{folder}/own.ckpt")
    trainer.strategy.teardown()
    loaded = trainer.strategy.checkpoint_io.load_checkpoint(f"{folder}/own.ckpt")
    assert_adapter_only(loaded, snapshot(Toy()))
    assert not list(tmp_path.rglob("*.partial"))


def test_adapters_of_another_file_system(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    _, _, keep = fit(f"memory://{tmp_path.name}", [])
    path = keep.best_model_path
    assert path.startswith("memory://") and fsspec.filesystem("memory").exists(path)
    for model in (load_adapter(Curve(), path), load_from_checkpoint(Curve, path)):
        toys.assert_same_tensors(adapter_state_dict(model), uninterrupted["saved"])
    started = Curve()
    lora = LoRA(r=2, adapter=path, merge=None, summary=False)
    toys.trainer(tmp_path, [lora], max_steps=1, limit_train_batches=1).test(started, loader(), verbose=False)
    toys.assert_same_tensors(adapter_state_dict(started), uninterrupted["saved"])


def test_what_is_read_may_still_be_on_its_way(tmp_path: Path) -> None:
    class Late(SlowTorch):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.5)
            super().save_checkpoint(*args, **kwargs)

    model, trainer, _ = fit(str(tmp_path), [AsyncCheckpointIO(Late())], max_epochs=1, merge=None)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    trainer.test(model, loader(), ckpt_path=tmp_path / "late.ckpt", verbose=False)


def test_what_a_write_in_the_background_raises_comes_before_the_merge(tmp_path: Path) -> None:
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fit(str(tmp_path), [AsyncCheckpointIO(Full())], max_epochs=2)


def test_a_checkpoint_that_was_removed_is_not_named(tmp_path: Path) -> None:
    _, trainer, keep = fit(str(tmp_path), [], merge=None)
    strategy = trainer.strategy
    assert strategy.last_checkpoint() == keep.last_model_path
    strategy.remove_checkpoint(keep.last_model_path)
    assert strategy.last_checkpoint() in keep.best_k_models
