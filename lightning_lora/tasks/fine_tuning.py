"""What the tasks share: a pretrained model that is built late, and how it is optimized."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW

from lightning_lora.tasks.fits_model import require_fit
from lightning_lora.tasks.schedule import linear_schedule
from lightning_lora.tasks.sharding import fully_shard_blocks


class FineTuning(L.LightningModule):
    """A model of transformers, built in ``configure_model``, trained by AdamW with a linear warm-up and decay.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>``.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps of linear warm-up; the rate then falls linearly to zero at the last step.
    """

    def __init__(self, pretrained: str, lr: float, weight_decay: float, warmup_steps: int) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        # Any: the classes of transformers are imported only when the model is built.
        self.model: Any = None
        self.tokenizer: Any = None

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model with weights of this dtype, and what else belongs to it."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Build the model, once, and shard it."""
        if self.model is None:
            # The trainer sets the default type from its precision around this hook. `from_pretrained` returns
            # evaluation mode, and the trainer keeps the mode it finds.
            self.model = self.build(torch.get_default_dtype()).train()
            self.shard()

    def shard(self) -> None:
        """Share the parameters among processes where the strategy leaves that to the module.

        That is ``ModelParallelStrategy``, which gives a device mesh; the others need nothing here.
        """
        if self.device_mesh is not None:
            fully_shard_blocks(self.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Make sure, before the first step, that the model can take the rows of the data module, if that shows them.

        Raises:
            ValueError: If it cannot.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "highest_token"):
            require_fit(self.model, data.highest_token, data.longest_row)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val_loss``, and what else the task measures."""
        self.score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same for ``test``."""
        self.score(batch, "test")

    def score(self, batch: Any, stage: str) -> None:
        """Log what a batch of ``"val"`` or ``"test"`` tells of the model."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the trainable parameters."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return linear_schedule(optimizer, self.warmup_steps, self.trainer.estimated_stepping_batches)
