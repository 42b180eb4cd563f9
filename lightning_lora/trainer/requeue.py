"""A SLURM job that is to be requeued is saved between steps alone."""

import signal
import threading
from typing import Any

import lightning.pytorch as pl


class Requeue:
    """A SLURM job's signal to save and requeue, which waits for a moment from which a run can go on.

    Lightning 2.6 saves as soon as the signal arrives, in the middle of a step too, whose batch is then lost.
    """

    _arrived: tuple[int, Any] | None = None
    _act: Any = None

    def wait(self, trainer: pl.Trainer) -> None:
        """From now on, let the signal wait for :meth:`act`.

        Only in a run of one process, since several get the signal in different steps. Lightning restores the signal's
        handler when the run ends.
        """
        # The strategies for one device have no cluster environment of their own.
        environment: Any = trainer._accelerator_connector.cluster_environment
        if not getattr(environment, "auto_requeue", False) or trainer.world_size > 1:
            return
        handler = signal.getsignal(environment.requeue_signal)
        is_lightnings = callable(handler) and type(handler).__module__.endswith("signal_connector")
        if is_lightnings and threading.current_thread() is threading.main_thread():
            self._act = handler
            signal.signal(environment.requeue_signal, self._arrive)

    def _arrive(self, number: int, frame: Any) -> None:
        self._arrived = (number, frame)

    def act(self) -> None:
        """Save and requeue now, if the signal has arrived."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            self._act(*arrived)


def requeue_waits(trainer: pl.Trainer) -> None:
    """From the start of training on, a requeue waits for the next call of :func:`requeue_if_asked`."""
    trainer.fit_loop.requeue.wait(trainer)  # type: ignore[attr-defined]


def requeue_if_asked(trainer: pl.Trainer) -> None:
    """Save and requeue at this moment, from which a run can go on, if the signal has arrived."""
    if trainer.state.fn == "fit":
        trainer.fit_loop.requeue.act()  # type: ignore[attr-defined]
