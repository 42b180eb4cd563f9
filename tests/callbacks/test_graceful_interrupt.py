"""Ctrl-C between steps: what is saved then, and that a run goes on from it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRA
from lightning_lora.callbacks import GracefulInterrupt
from lightning_lora.data import ResumableDataLoader


class Pressed(L.Callback):
    """Ctrl-C in the middle of a step, as often as is said."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class PressedInValidation(L.Callback):
    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4 and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # Lightning ignores the signal while it shuts down, and leaves it so


def fit(folder: Path, *more: L.Callback, ckpt_path: str | None = None, keep: bool = True) -> toys.Toy:
    torch.manual_seed(0)
    model = toys.Toy()
    kept = [ModelCheckpoint(folder / "kept", filename="last", enable_version_counter=False)] if keep else []
    run = toys.trainer(
        folder, [LoRA(r=2, summary=False, merge=None), *kept, *more], max_epochs=3, enable_checkpointing=keep
    )
    batches = ResumableDataLoader(toys.dataset(), batch_size=8)
    run.fit(model, batches, toys.loader(), ckpt_path=ckpt_path)
    return model


def test_the_step_is_finished_and_saved_and_the_run_goes_on(
    tmp_path: Path, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(tmp_path / "whole")
    steps = len(toys.loader())
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        fit(tmp_path, Pressed(steps + 2), GracefulInterrupt())
    saved = tmp_path / "kept" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == steps + 3
    assert f"Saved step {steps + 3} to {saved}. The same command with --ckpt_path last goes on." in caplog.text
    signal.signal(signal.SIGINT, handler)
    resumed = fit(tmp_path, GracefulInterrupt(), ckpt_path="last")
    toys.assert_same_tensors(whole.state_dict(), resumed.state_dict())
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_one_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Pressed(1, times=2), GracefulInterrupt())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_in_a_validation(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, PressedInValidation(), GracefulInterrupt())
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_without_checkpoints_it_is_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Pressed(1), GracefulInterrupt(), keep=False)
    assert not list(tmp_path.rglob("*.ckpt"))
