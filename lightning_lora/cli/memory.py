"""``lightning-lora memory``: what a fit would hold in memory, before it does."""

from pydoc import locate
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from rich.console import Console
from rich.table import Column, Table

from lightning_lora.callback import LoRA
from lightning_lora.callbacks import ActivationCheckpointing, BaseAsReference, MaxUpdateNorm
from lightning_lora.trainer.memory import MemoryEstimate

# Callbacks that change what is trained or kept; the others would only leave traces.
_OF_THE_STEP = (
    LoRA,
    ActivationCheckpointing,
    BaseAsReference,
    MaxUpdateNorm,
    BaseFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
_TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "profiler": None,
    "fast_dev_run": False,
    "max_epochs": 1,
    "max_steps": -1,
    "max_time": None,
    "limit_train_batches": 1.0,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_LORA: dict[str, Any] = {"merge": None, "export_dir": None, "adapter": None, "summary": False, "verify": False}


def prepare(trainer: Any) -> str | None:
    """Change the settings of a trainer for one that fits two steps and leaves no trace.

    Returns:
        What is to be said of several processes, ``None`` if the run has one.
    """
    said = _of_processes(trainer)
    for name, value in _TRAINER.items():
        trainer[name] = value
    trainer.accumulate_grad_batches = min(2, trainer.accumulate_grad_batches or 1)  # more keep no more
    given = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    trainer.callbacks = [each for each in given if each is not None and _is_of_the_step(each.class_path)]
    for callback in trainer.callbacks:
        if locate(callback.class_path) is LoRA:
            for name, value in _LORA.items():
                callback.init_args[name] = value
            if callback.init_args.get("init_lora_weights") == "eva":  # which looks at values
                callback.init_args["init_lora_weights"] = True
    return said


def _is_of_the_step(class_path: str) -> bool:
    found = locate(class_path)
    return isinstance(found, type) and issubclass(found, _OF_THE_STEP)


def _of_processes(trainer: Any) -> str | None:
    strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    name = strategy.rpartition(".")[2].lower()
    if "fsdp" in name or "modelparallel" in name or "deepspeed" in name:
        return (
            f"{strategy} shares the model among processes: of N, each holds about an N-th of the base, of what is "
            "trained, of gradients and of moments, and beside them the largest part that is gathered at once. The "
            "activations are as above. The figures are those of one process that shares nothing."
        )
    several = trainer.num_nodes != 1 or trainer.devices not in (1, "1", "auto")
    if "ddp" in name or several:
        return "Each process holds this, and DDP keeps buckets beside it that are as large as the gradients."
    return None


def show(found: MemoryEstimate, of_processes: str | None) -> None:
    """Print the table."""
    headings = Column("in all", justify="right"), Column("at the peak", justify="right")
    table = Table("", *headings, title=f"Memory of a training step ({found.batch})", title_justify="left")
    for name, size, is_optional in (
        ("frozen base", found.frozen, False),
        ("adapters", found.adapters, False),
        ("other trained parameters", found.others, True),
        ("copies and averages", found.kept, True),
        ("optimizer moments", found.moments, False),
    ):
        if not is_optional or size >= 0.001 * found.peak:
            table.add_row(name, bytes_in_words(size), bytes_in_words(size))
    table.add_row("gradients", bytes_in_words(found.gradients), bytes_in_words(found.gradients_at_peak))
    table.add_row("activations", "", bytes_in_words(found.activations), end_section=True)
    table.add_row("peak", "", bytes_in_words(found.peak))
    console = Console(highlight=False)
    console.print(table)
    if of_processes is not None:
        console.print(of_processes)


def bytes_in_words(size: int) -> str:
    """Such as ``1,234.5 MB``."""
    return f"{size / 1e6:,.1f} MB"
