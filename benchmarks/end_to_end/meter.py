"""What is measured of a run, from within: seconds and processor seconds of its steps, their losses, and memory."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from benchmarks.end_to_end.start import same_start


class Meter:
    """Figures of a run, written to a file with its last step.

    Args:
        path: The file.
        warm_up: How many first steps do not count.
        steps: How many count.
    """

    def __init__(self, path: str, warm_up: int, steps: int) -> None:
        self.path, self.warm_up, self.steps = Path(path), warm_up, steps
        self.losses: list[float] = []
        self.clock: list[tuple[float, float]] = []

    def begin(self, model: nn.Module) -> None:
        """Before the first step, once all is loaded: give the adapter its start, and note what is in memory."""
        same_start(model)
        self.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.resting = process_memory("VmRSS")

    def end_step(self, loss: float) -> None:
        """After each step."""
        self.losses.append(loss)
        self.clock.append((time.perf_counter(), time.process_time()))
        if len(self.clock) == self.warm_up + self.steps:
            self.path.write_text(json.dumps(self.figures()))

    def figures(self) -> dict[str, Any]:
        """All that was measured, once the last step is done."""
        (start, used_before), (end, used) = self.clock[self.warm_up - 1], self.clock[-1]
        return {
            "seconds": end - start,
            "cpu_seconds": used - used_before,
            "losses": self.losses,
            "trained": self.trained,
            "resting_bytes": self.resting,
            "peak_bytes": process_memory("VmHWM"),
        }


class MeterCallback(Callback):
    """The same as a callback of Lightning. The arguments are those of :class:`Meter`."""

    def __init__(self, path: str, warm_up: int, steps: int) -> None:
        self.meter = Meter(path, warm_up, steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.meter.begin(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.meter.end_step(float(outputs["loss"]))


def process_memory(field: str) -> int:
    """Of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
