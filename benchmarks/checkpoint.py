"""Writing, reading and resuming from a Lightning checkpoint: ours, PEFT's model in the same module, full fine-tuning.

All are trained for a step with AdamW, and written with ``trainer.save_checkpoint``. Reading is ``torch.load``. Resuming
is the time from ``trainer.fit(..., ckpt_path=...)`` to the first batch, less the same without a checkpoint.
``--clock cpu``, on one thread, can be compared where others share the machine, too: it leaves out waiting, as for the
disk.

    python -m benchmarks.checkpoint
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks.harness import SHAPES
from lightning_lora import LoRA


class Module(L.LightningModule):
    """Trains on eight tokens."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-5)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(8).unsqueeze(0) % self.vocabulary)  # type: ignore[arg-type]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Clock(Callback):
    """The time at which training starts, with everything restored."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.now()


class Contender:
    """A module to train, with the callbacks that it needs."""

    def __init__(self, module: Module, path: Path, lora: bool, r: int, now: Callable[[], float]) -> None:
        self.module, self.path, self.lora, self.r, self.now = module, path, lora, r, now
        self.trainer, _ = self.fit(None)

    def fit(self, ckpt_path: Path | None) -> tuple[L.Trainer, float]:
        """Train for a step, or, from a checkpoint, restore and stop; and the seconds until the first batch."""
        clock = Clock(self.now)
        callbacks: list[Callback] = [clock]
        if self.lora:
            callbacks.append(LoRA(r=self.r, lora_alpha=2 * self.r, merge=None, summary=False))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=2 if ckpt_path else 1,
            max_epochs=-1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = self.now()
        trainer.fit(self.module, ckpt_path=ckpt_path, weights_only=True)
        return trainer, clock.started - start

    def write(self) -> float:
        start = self.now()
        self.trainer.save_checkpoint(self.path)
        return self.now() - start

    def read(self) -> float:
        start = self.now()
        torch.load(self.path, weights_only=True)
        return self.now() - start

    def resume(self) -> float:
        """Seconds more to the first batch than a fresh start takes."""
        _, fresh = self.fit(None)
        _, resumed = self.fit(self.path)
        return resumed - fresh


def _in_turns(contenders: dict[str, Contender], what: str, turns: int) -> dict[str, list[float]]:
    """Seconds of each contender in each turn; the first turn does not count."""
    found = [{name: getattr(one, what)() for name, one in contenders.items()} for _ in range(turns + 1)]
    return {name: [turn[name] for turn in found[1:]] for name in contenders}


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=3)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shape = SHAPES[args.shape]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "ours": harness.base(shape),
            "PEFT": harness.theirs(harness.base(shape), args.r, "all"),
            "full": harness.base(shape),
        }
        contenders = {
            name: Contender(
                Module(model, shape.vocabulary),
                Path(folder) / f"{name}.ckpt",
                name == "ours",
                args.r,
                CLOCKS[args.clock],
            )
            for name, model in models.items()
        }
        times = {what: _in_turns(contenders, what, args.turns) for what in ("write", "read", "resume")}
        found = {what: harness.ratios(seconds, to="full") for what, seconds in times.items()}
        for name, one in contenders.items():
            rows[name] = {what: ratios[name] for what, ratios in found.items()}
            rows[name]["bytes"] = one.path.stat().st_size
    for row in rows.values():
        row["bytes of full"] = row["bytes"] / rows["full"]["bytes"]

    def cells(row: dict[str, Any]) -> list[str]:
        timed = (row[what] for what in times)
        return [
            f"{row['bytes'] / 1e6:,.1f} MB, {row['bytes of full']:.3f}",
            *(f"{one['seconds']:.3f} s, {harness.spread(one)}" for one in timed),
        ]

    harness.report("checkpoint", args, rows, ("size, of full", *(f"{what}, of full" for what in times)), cells)


if __name__ == "__main__":
    main()
