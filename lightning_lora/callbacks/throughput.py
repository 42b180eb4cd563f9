"""How fast a run is, how long it takes still, and how much memory it has needed."""

import math
import sys
import time
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Throughput(Callback):
    """Show in the progress bar, and log, tokens a second, the minutes that are left, and the peak of memory.

    ``tokens_per_second`` is that of the last batch, with the wait for it and without padding, in this process; where
    batches have no ``input_ids``, there is ``rows_per_second`` in its place. ``minutes_left`` counts validation as it
    took so far. ``peak_memory_gb`` is that of tensors on a GPU, else that of the whole process, in units of 10^9 bytes.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._start = self._since = time.perf_counter()
        self._first = trainer.fit_loop.total_batch_idx + 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures."""
        now = time.perf_counter()
        found = {name: amount / (now - self._since) for name, amount in _amount(batch).items()}
        self._since = now
        done = trainer.fit_loop.total_batch_idx + 1
        left = _total(trainer) - done
        if math.isfinite(left):
            found["minutes_left"] = max(0.0, left) * (now - self._start) / max(1, done - self._first) / 60
        peak = peak_memory(pl_module.device)
        if peak is not None:
            found["peak_memory_gb"] = peak / 1e9
        pl_module.log_dict(found, prog_bar=True, batch_size=1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave it out of the next batch's time."""
        self._since = time.perf_counter()


def _amount(batch: Any) -> dict[str, int]:
    """What a batch has of what is counted, by the name of the figure."""
    if isinstance(batch, dict) and isinstance(batch.get("input_ids"), Tensor):
        mask = batch.get("attention_mask")
        return {"tokens_per_second": int(mask.sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()}
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else [batch]
    rows = next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), None)
    return {} if rows is None else {"rows_per_second": rows}


def _total(trainer: L.Trainer) -> float:
    """How many batches a run trains on; infinite if it has no end."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    by_epochs = epochs * trainer.num_training_batches if epochs is not None and epochs >= 0 else math.inf
    by_steps = steps * trainer.accumulate_grad_batches if steps >= 0 else math.inf
    return min(by_epochs, by_steps)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were in tensors on a GPU, or in this process; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if find_spec("resource") is None:  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
