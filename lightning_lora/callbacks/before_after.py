"""What a fit has changed, printed for a person."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lora.callbacks.outputs import file_bytes, megabytes, outputs, weight_bytes


class BeforeAfter(Callback):
    """Print a metric and a sample of text from before and after a fit, with the sizes of the files it wrote.

    The figures of "before" are those of the sanity check: set the trainer's ``num_sanity_val_steps`` to -1, so that it
    covers the whole validation set. The module must have a method ``generate(prompt, max_new_tokens) -> str``, like
    :class:`~lightning_lora.tasks.CausalLM`. Under FSDP there are no samples.

    Args:
        prompt: What the model is asked, before and after.
        monitor: Name of the logged validation metric. Default ``val_loss``, shown with its perplexity.
        max_new_tokens: Upper limit of each sample, in tokens. Default 40.

    Raises:
        TypeError: At the start of a fit, if the module has no ``generate``.
    """

    def __init__(self, prompt: str, monitor: str = "val_loss", max_new_tokens: int = 40) -> None:
        super().__init__()
        self.prompt = prompt
        self.monitor = monitor
        self.max_new_tokens = max_new_tokens
        self.metric_before: float | None = None
        self.metric_after: float | None = None
        self.sample_before: str | None = None
        self.sample_after: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage != "fit":
            return
        if not callable(getattr(pl_module, "generate", None)):
            raise TypeError(
                f"BeforeAfter found no method generate(prompt, max_new_tokens) on {type(pl_module).__name__}, expected "
                "one, as lightning_lora.tasks.CausalLM has it. Add the method or remove the callback."
            )
        self.metric_before = self.metric_after = self.sample_before = self.sample_after = None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record what the model does before training."""
        self.metric_before = self._metric(trainer)
        self.sample_before = self._sample(trainer, pl_module)
        if trainer.num_sanity_val_batches != trainer.num_val_batches:
            rank_zero_warn(
                f"BeforeAfter found a sanity check of {trainer.num_sanity_val_batches} of {trainer.num_val_batches} "
                "batches, so 'before' and 'after' are not measured on the same rows. Set the trainer's "
                "num_sanity_val_steps to -1."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the latest metric."""
        if not trainer.sanity_checking:
            self.metric_after = self._metric(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample again, while the model is still on its device."""
        self.sample_after = self._sample(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the report, after every callback has finished its files in ``on_fit_end``."""
        if stage == "fit":
            self._print(trainer, pl_module)

    def _metric(self, trainer: L.Trainer) -> float | None:
        value = trainer.callback_metrics.get(self.monitor)
        return None if value is None else float(value)

    def _sample(self, trainer: Any, pl_module: Any) -> str:
        if any(isinstance(module, FullyShardedDataParallel) for module in trainer.strategy.model.modules()):
            return "(none under FSDP, which has the weights whole in steps alone)"
        # On every rank: with sharded weights all of them must take part.
        return str(pl_module.generate(self.prompt, self.max_new_tokens))

    @rank_zero_only
    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        if self.sample_before is None:
            rank_zero_warn(
                "BeforeAfter found no sanity check, expected one for the figures of 'before'. Set the trainer's "
                "num_sanity_val_steps to -1 (a resumed or fast_dev_run fit has none)."
            )
        results = Table("", "before", "after", title=Text(f"Before and after: {self.prompt}"), show_lines=True)
        results.add_row(Text(self.monitor), _number(self.metric_before, 4), _number(self.metric_after, 4))
        if self.monitor == "val_loss":
            results.add_row("perplexity", *(_perplexity(loss) for loss in (self.metric_before, self.metric_after)))
        # Text: square brackets in an answer are not markup.
        results.add_row("sample", Text(self.sample_before or "-"), Text(self.sample_after or "-"))
        files = Table("", "size", "path")
        files.add_row("all weights in memory", megabytes(weight_bytes(pl_module)), "")
        for name, path in outputs(trainer):
            files.add_row(name, megabytes(file_bytes(path)), Text(str(path), overflow="fold"))
        console = Console()
        console.print(results)
        console.print(files)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _perplexity(loss: float | None) -> str:
    # Above 700, the exponential does not fit a float.
    return _number(math.exp(loss) if loss is not None and loss < 700 else None, 1)
