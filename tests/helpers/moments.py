"""Runs that are saved at every moment, and the runs that go on from there: what must be equal, to the bit."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from helpers import toys
from helpers.toys import Toy, assert_same_tensors, dataset
from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader


class NoisyRows(Dataset[Any]):
    """Rows that are augmented at random, by all three libraries, wherever they are read."""

    def __len__(self) -> int:
        return len(dataset())

    def __getitem__(self, index: int) -> Any:
        x, y = dataset()[index]
        return x + 0.1 * torch.randn(8) + random.random() + float(np.random.rand()), y


class Noisy(Toy):
    """Draws random numbers in training and in validation; its schedulers follow steps or metrics."""

    def __init__(self, scheduler: str = "step", validation_draws: bool = True) -> None:
        super().__init__()
        self.scheduler, self.validation_draws = scheduler, validation_draws

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        noise = 1.0
        if self.validation_draws:
            noise += float(torch.rand(())) + random.random() + float(np.random.rand())
            self.net[3].train()
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]) * noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        assert self.trainer.estimated_stepping_batches  # which makes the loader before the progress is restored
        if self.scheduler == "step":
            follow: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": follow, "interval": "step"}}
        follow = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7, threshold=0.5)
        monitor = {"monitor": "val_loss" if self.scheduler == "val" else "train_loss", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": follow, "interval": "epoch", **monitor}}


class ByHand(Noisy):
    """Steps by itself, after every third batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % 3 == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Record(DummyLogger):
    """What was logged, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        self.lines.append((step, dict(metrics)))


class SaveAt(Callback):
    """Save at every occasion of the kinds of moments named, and note how much had been logged by then."""

    KINDS = ("batch_end", "validation_start", "in_validation", "validation_end", "epoch_end")

    def __init__(self, folder: Path, kinds: Any = KINDS) -> None:
        self.folder, self.kinds, self.saved = folder, kinds, {}  # type: ignore[var-annotated]

    def save(self, trainer: Any, kind: str) -> None:
        if kind in self.kinds and not trainer.sanity_checking:
            path = self.folder / f"{len(self.saved)}-{kind}-{trainer.fit_loop.total_batch_idx}.ckpt"
            self.saved[path] = len(trainer.logger.lines)
            trainer.save_checkpoint(path)

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer, "batch_end")

    def on_validation_start(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer, "in_validation")

    def on_validation_end(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer, "epoch_end")


class Draws(Callback):
    """Draws a random number in one of its hooks."""

    def __init__(self, hook: str | None) -> None:
        if hook is not None:
            setattr(self, hook, lambda *_: torch.rand(()))


@dataclass
class Setup:
    """A run's settings; the same for the whole run and for the one that goes on."""

    data: str = "shuffle"  # of a ResumableDataLoader; "generator", "epochs" of EpochSampler, "plain" of a DataLoader
    workers: int = 0
    augmented: bool = False
    dropout: float = 0.2
    validation_draws: bool = True
    draws_in: str | None = None  # a hook
    scheduler: str = "step"
    accumulation: dict[int, int] | None = None  # by epoch
    module: type[Noisy] = Noisy
    trainer: dict[str, Any] = field(default_factory=dict)

    def loader(self) -> DataLoader[Any]:
        rows = NoisyRows() if self.augmented else dataset()
        settings: dict[str, Any] = {"batch_size": 4, "num_workers": self.workers}
        if self.data == "plain":
            return DataLoader(rows, shuffle=True, **settings)
        if self.data == "epochs":
            return ResumableDataLoader(rows, sampler=EpochSampler(len(rows), seed=3), **settings)
        if self.data == "generator":
            settings["generator"] = torch.Generator().manual_seed(5)
        return ResumableDataLoader(rows, shuffle=True, **settings)

    def run(self, folder: Path, ckpt_path: Path | None = None, kinds: Any = (), **kw: Any) -> Any:
        """The model, its Trainer, what was logged, and what was saved."""
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(7 if ckpt_path is None else 999)
        model = kw.pop("model", None) or self.module(self.scheduler, self.validation_draws)
        lora = LoRA(r=2, lora_dropout=self.dropout, summary=False, merge=None)
        save, record = SaveAt(folder, kinds), Record()
        settings = {"max_epochs": 3, "logger": record, "log_every_n_steps": 1, "enable_checkpointing": False}
        callbacks = [lora, Draws(self.draws_in), save, *kw.pop("callbacks", [])]
        if self.accumulation is not None:
            callbacks.append(GradientAccumulationScheduler(self.accumulation))
        trainer = toys.trainer(folder, callbacks, **(settings | self.trainer | kw))
        shuffled = DataLoader(dataset(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(2))
        trainer.fit(model, self.loader(), shuffled, ckpt_path=ckpt_path)
        return model, trainer, record.lines, save.saved


def difference(resumed: Any, whole: Any, saved_at: int, kind: str = "batch_end") -> str | None:
    """In what a resumed run differs from the whole one, first of all."""
    (model, trainer, lines, _), (whole_model, whole_trainer, whole_lines, _) = resumed, whole
    if trainer.global_step != whole_trainer.global_step or trainer.current_epoch != whole_trainer.current_epoch:
        return f"ends at step {trainer.global_step}, not {whole_trainer.global_step}"
    expected = whole_lines[saved_at:]
    # Lightning logs a batch right after the checkpoint of its end.
    if lines != expected and not (kind == "batch_end" and lines == expected[1:]):
        return f"logs {lines[:2]} of {len(lines)}, not {expected[:2]} of {len(expected)}"
    try:
        assert_same_tensors(adapter_state_dict(model), adapter_state_dict(whole_model))
    except AssertionError:
        return "ends with another adapter"
    (optimizer,), (whole_optimizer,) = trainer.optimizers, whole_trainer.optimizers
    for one, other in zip(optimizer.state.values(), whole_optimizer.state.values(), strict=True):
        if one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in other):
            return "ends with another state of the optimizer"
    if optimizer.param_groups[0]["lr"] != whole_optimizer.param_groups[0]["lr"]:
        return "ends with another learning rate"
    return None


def kind_of(path: Path) -> str:
    return path.name.split("-")[1]
