"""All that looks at one very run while it trains."""

import dataclasses
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_lora.trainer.base_changes import BaseWatch
from lightning_lora.trainer.finite_steps import FiniteSteps
from lightning_lora.trainer.gradient_checks import GradientWatch
from lightning_lora.trainer.merge_probe import MergeProbe
from lightning_lora.trainer.step_reads import StepReads


@dataclasses.dataclass
class Watches:
    """What looks at a run, each from its moment on; none looks before, or at a run that another callback looks at."""

    gradients: GradientWatch | None = None
    base: BaseWatch | None = None
    reads: StepReads | None = None
    finite: FiniteSteps | None = None
    probe: MergeProbe | None = None

    def begin_fit(self, pl_module: "pl.LightningModule", optimizers: list[Any], probes: bool) -> None:
        """All adapters have their start. With ``probes``, inputs are kept by which a merge is probed."""
        self.gradients = GradientWatch(pl_module, optimizers)
        self.base = BaseWatch(pl_module, optimizers)
        self.reads = StepReads(pl_module)
        self.probe = MergeProbe(pl_module) if probes else None

    def begin_steps(self, trainer: "pl.Trainer", on_nan: str) -> None:
        """No step is a trial from now on."""
        self.finite = FiniteSteps(trainer, on_nan) if on_nan != "ignore" else None

    def before_batch(self, batch: Any) -> None:
        """Require that the base is frozen still, and that the step reads none of the adapted weights by itself."""
        if self.base is not None:
            self.base.require_frozen()
        if self.reads is not None:
            self.reads.start(batch)

    def before_backward(self, loss: Tensor) -> None:
        """Look whether the loss is finite."""
        if self.finite is not None:
            self.finite.before_backward(loss)

    def after_backward(self) -> None:
        """Require gradients in the adapters, until it is known that they come."""
        if self.reads is not None:
            self.reads.require_none()
        if self.gradients is not None:
            self.gradients.after_backward()
            if self.gradients.is_over:
                self.gradients = None

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Let no NaN and no infinity into the adapters."""
        if self.finite is not None:
            self.finite.before_optimizer_step(optimizer)

    def before_save(self) -> None:
        """Say so if the base is no longer the one on which a checkpoint will be opened."""
        if self.base is not None:
            self.base.warn_of_moved()

    def after_batch(self) -> None:
        """The step has read what it reads."""
        if self.reads is not None:
            self.reads.stop()

    def end_steps(self) -> None:
        """Judge the last step."""
        if self.finite is not None:
            self.finite.finish()

    def end_fit(self) -> list[str]:
        """Judge what never got a gradient, and return the names of what has moved of the base."""
        if self.gradients is not None:
            self.gradients.finish()
        return self.base.warn_of_moved(thoroughly=True) if self.base is not None else []

    def stop(self) -> None:
        """Look no longer."""
        for watch in (self.gradients, self.reads, self.finite, self.probe):
            if watch is not None:
                watch.stop()
