"""A checkpoint that is interrupted half-way never takes the place of the last good one."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed.processes import end_processes
from helpers.models import tiny_llama
from helpers.saving import HalfSave, fit
from helpers.toys import Toy, assert_adapter_only, snapshot
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.testing._internal.two_tensor import TwoTensor

from lightning_lora import LoraConfig, eject, inject
from lightning_lora.formats.merged import save_merged
from lightning_lora.trainer import atomic_save

SAVED = {"last.ckpt"}


def files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if file.is_file()}


def assert_goes_on_from_step(step: int, path: Path) -> None:
    assert_adapter_only(path / "last.ckpt", snapshot(Toy()))
    assert torch.load(path / "last.ckpt", weights_only=True)["global_step"] == step
    trainer = fit(path, ckpt_path="last")
    assert trainer.global_step == 8
    assert files(path) == SAVED  # nothing is left lying about either


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    (ended,) = end_processes("killed_while_saving", str(tmp_path), world_size=1)
    assert ended.returncode == -signal.SIGKILL, ended.output
    assert len(files(tmp_path)) == 2  # half a file lies there, under a name that is no checkpoint's
    assert_goes_on_from_step(4, tmp_path)


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()], [AsyncCheckpointIO(TorchCheckpointIO())]])
def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: list[Any]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", HalfSave(times=2))
        with pytest.raises(OSError, match="no space left"):
            fit(tmp_path, plugins=plugins)
    assert files(tmp_path) == SAVED
    assert_goes_on_from_step(4, tmp_path)


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]])
def test_a_full_directory_for_temporary_files_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: list[Any]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))  # where nothing can be written
    with pytest.raises(OSError, match="gone"):
        tempfile.mkstemp()
    fit(tmp_path / "run", plugins=plugins, export=tmp_path / "export")
    assert files(tmp_path / "run") == SAVED
    assert (tmp_path / "export" / "adapter" / "adapter_model.safetensors").exists()
    model = inject(tiny_llama(), LoraConfig(r=2))
    save_merged(eject(model, merge=True), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_write_goes_to_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (events.append(name), real(*a)))
    (tmp_path / "partial").write_text("new")
    (tmp_path / "target").write_text("old")
    atomic_save.publish(tmp_path / "partial", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "new"
    assert events == ["fsync", "replace", "fsync"]


def test_other_writers_and_remote_files_are_left_as_they_are(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        paths: list[str] = []

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            self.paths.append(str(path))
            super().save_checkpoint(checkpoint, path, storage_options)

    own = Own()
    trainer = fit(tmp_path, plugins=[own])
    assert set(own.paths) == {str(tmp_path / "last.ckpt")}
    trainer = fit(tmp_path, merge=None)
    trainer.save_checkpoint("memory://atomic_save/remote.ckpt")
    loaded = trainer.strategy.checkpoint_io.load_checkpoint("memory://atomic_save/remote.ckpt")
    assert_adapter_only(loaded, snapshot(Toy()))
    trainer.save_checkpoint(f"file://{tmp_path}/local.ckpt")
    assert_adapter_only(tmp_path / "local.ckpt", snapshot(Toy()))


class Sharded:
    """Writes directories, as Lightning's strategies do that shard."""

    _save_distributed_checkpoint = True
    is_global_zero = True

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self, name: str) -> None:
        assert name


def test_a_directory_takes_the_place_of_another_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    for turn in range(2):
        with atomic_save.writing(Sharded(), target) as path:
            path.mkdir()
            (path / "0.distcp").write_text(str(turn))
            (path / f"only-in-{turn}").write_text("")
            assert target.exists() == (turn > 0)
    with pytest.raises(OSError, match="no space left"), atomic_save.writing(Sharded(), target) as path:  # noqa: PT012
        path.mkdir()
        (path / "left-over").write_text("")
        raise OSError("no space left")
    assert {file.name for file in target.iterdir()} == {"0.distcp", "only-in-1", "checksums.json"}
    with atomic_save.writing(Sharded(), target) as path:
        path.mkdir()
        (path / "0.distcp").write_text("2")
    assert {file.name for file in target.iterdir()} == {"0.distcp", "checksums.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class KeepsSubclasses(torch.optim.SGD):
    """Keeps its state in a subclass of tensors, as torchao's optimizers in 8 bits do."""

    def step(self, closure: Any = None) -> Any:
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter]["last"] = TwoTensor(parameter.detach().clone(), parameter.detach().clone())
        return super().step(closure)


class ToyOfSubclasses(Toy):
    def configure_optimizers(self) -> Any:
        return KeepsSubclasses(self.parameters(), lr=0.1)


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO(TorchCheckpointIO())]])
def test_optimizers_that_keep_subclasses_of_tensors_resume(tmp_path: Path, plugins: list[Any]) -> None:
    fit(tmp_path, module=ToyOfSubclasses(), plugins=plugins, max_steps=2)
    with torch.serialization.safe_globals([TwoTensor]):
        resumed = fit(tmp_path, "last", module=ToyOfSubclasses(), plugins=plugins, max_steps=4)
    assert resumed.global_step == 4
