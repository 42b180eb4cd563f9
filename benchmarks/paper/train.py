"""One run: train a contender, and measure everything but time."""

import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.paper.contenders import TASKS, build, kind_of, lora_config, train_only
from lightning_lora import LoRA

SEARCH_ROWS = 128


class TrainOnly(Callback):
    """Train one part of a module, such as its head, and freeze the rest."""

    def __init__(self, part: str) -> None:
        self.part = part

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.configure_model()
        train_only(pl_module, self.part)


def train(
    task: str, contender: str, seed: int, lr: float, search: bool, steps: int, weights: str | None
) -> dict[str, Any]:
    """Train and measure.

    Args:
        task: Name of the task.
        contender: Name of the contender.
        seed: Seed of what starts at random, and of the order of the rows.
        lr: Peak learning rate.
        search: Whether to score on training rows kept aside, for the choice of the rate, in place of those held out.
        steps: Optimizer steps.
        weights: See :func:`~benchmarks.paper.contenders.build`.

    Returns:
        ``quality`` (the task's metric), ``trained`` (parameters), ``checkpoint_bytes``, ``optimizer_bytes`` and
        ``peak_bytes`` (of the process, from its start to the end of training).
    """
    L.seed_everything(seed)
    module, data = build(task, contender, lr, weights)
    data.setup("fit")
    rows = data.train_rows
    if search:
        data.val_rows, rows = rows[:SEARCH_ROWS], rows[SEARCH_ROWS:]
    data.train_rows = rows
    data.seed = seed  # the split is made; this is the order of the rows
    config = lora_config(task, contender, seed)
    part = TASKS[task].trained.get(kind_of(contender))
    callbacks: list[Callback] = [LoRA(config=config, merge=None, summary=False)] if config else []
    callbacks += [TrainOnly(part)] if part else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            limit_val_batches=0,
            default_root_dir=folder,
            **_QUIET,
        )
        trainer.fit(module, data)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        found = {
            "peak_bytes": _peak_bytes(),
            "trained": sum(parameter.numel() for parameter in trained.values()),
            "optimizer_bytes": _optimizer_bytes(trainer),
        }
        path = Path(folder) / "weights.ckpt"
        if part:
            torch.save(trained, path)
        else:
            trainer.save_checkpoint(path, weights_only=True)
        found["checkpoint_bytes"] = path.stat().st_size
    (scores,) = L.Trainer(accelerator="cpu", precision="bf16-mixed", **_QUIET).validate(module, data, verbose=False)
    return {"quality": scores[TASKS[task].metric], **found}


_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _peak_bytes() -> int:
    """Of this process, from Linux; ``getrusage`` would count what its parent had before it started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _optimizer_bytes(trainer: L.Trainer) -> int:
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
