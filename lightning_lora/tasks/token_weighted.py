"""Steps in which every label token counts the same."""

from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.tasks.fine_tuning import FineTuning

# About what a micro-batch has, so that losses keep the size that mixed precision's scaler has found.
_REFERENCE = 1024.0


class TokenWeighted(FineTuning):
    """Micro-batches and processes whose gradients are added weigh by their label tokens, as one large batch would.

    Lightning adds means, in which the tokens of a short micro-batch count more. DeepSpeed, which keeps gradients to
    itself, is left to that.
    """

    def __init__(self, pretrained: str, lr: float, weight_decay: float, warmup_steps: int) -> None:
        super().__init__(pretrained, lr, weight_decay, warmup_steps)
        self._tokens: int | None = None  # of the step that is being made

    def weigh(self, loss: Tensor, tokens: int) -> Tensor:
        """What a training step returns for a mean loss over so many label tokens."""
        if not self._adds_gradients():
            return loss
        self._tokens = (self._tokens or 0) + tokens
        return loss * (tokens / _REFERENCE)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the number of tokens, of all micro-batches and processes."""
        if self._tokens is None:
            return
        # Lightning has divided by the number of micro-batches, and taken the mean over processes.
        mean = self.trainer.strategy.reduce(torch.tensor(float(self._tokens), device=self.device), reduce_op="mean")
        factor = _REFERENCE * self.trainer.accumulate_grad_batches / max(1.0, float(mean))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self._tokens = None

    def _adds_gradients(self) -> bool:
        trainer: Any = self._trainer  # none outside of a run
        if trainer is None or isinstance(trainer.strategy, DeepSpeedStrategy):
            return False
        return bool(trainer.accumulate_grad_batches > 1 or trainer.world_size > 1)
