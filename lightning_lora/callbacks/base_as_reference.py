"""``BaseAsReference``: the base under the adapters as the reference model of a task, with no second copy of it."""

from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_lora.model.multi_adapter import disabled


class BaseAsReference(Callback):
    """Give a task such as :class:`~lightning_lora.tasks.DPO` the base under the adapters as its reference model.

    The task finds in its attribute ``reference`` what makes a context in which it is the base model.
    """

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Hand over what switches the adapters off."""
        pl_module.reference = partial(disabled, pl_module)  # type: ignore[assignment]

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Take it back."""
        pl_module.reference = None  # type: ignore[assignment]
