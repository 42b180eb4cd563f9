"""``GracefulInterrupt``: Ctrl-C between steps, with a checkpoint of the newest."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info


class GracefulInterrupt(Callback):
    """Have Ctrl-C wait for the end of the step, save ``last.ckpt`` there, and say how to go on.

    It goes beside the other checkpoints, where ``ckpt_path="last"`` finds it. A second Ctrl-C ends the run at once.
    Without a ``ModelCheckpoint``, or in a run of several processes, which get the signal in different steps, Ctrl-C is
    left as it is. The command line has this callback in every ``fit``.
    """

    def __init__(self) -> None:
        self._arrived = False
        self._before: Any = None

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Wait for the signal."""
        alone = trainer.world_size == 1 and threading.current_thread() is threading.main_thread()
        if alone and trainer.checkpoint_callback is not None and not getattr(trainer, "fast_dev_run", False):
            self._arrived = False
            self._before = signal.signal(signal.SIGINT, self._arrive)

    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Save and end the run, if the signal has arrived."""
        self._end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """The same in a validation between steps."""
        self._end_if_asked(trainer)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave the signal as it was."""
        self._release()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """The same."""
        self._release()

    def _arrive(self, number: int, frame: Any) -> None:
        self._arrived = True
        self._release()  # so that a second one ends the run at once
        rank_zero_info("\nInterrupted: this step is finished and saved first. Ctrl-C again ends at once.")

    def _release(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _end_if_asked(self, trainer: "pl.Trainer") -> None:
        if not self._arrived:
            return
        self._arrived = False
        path = Path(str(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir), "last.ckpt")
        trainer.save_checkpoint(path)
        rank_zero_info(f"Saved step {trainer.global_step} to {path}. The same command with --ckpt_path last goes on.")
        raise KeyboardInterrupt
