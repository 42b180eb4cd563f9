"""Preference tuning of a causal language model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_lora.eval_mode import evaluating
from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.label_losses import label_losses


class DPO(CausalLM):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290).

    A batch holds chosen answers in its first half and rejected ones in its second, as
    :class:`~lightning_lora.data.PreferenceData` makes it. Logged are ``train_loss`` and ``val_loss`` (0.693 where the
    model is the reference), ``val_accuracy`` (share of pairs whose chosen answer gained more probability than the
    rejected one) and ``val_margin`` (mean difference of the two rewards).

    The reference is this very model with its adapters switched off, so that there is no second copy in memory. What
    switches them off is :attr:`reference`, which the callback ``lightning_lora.BaseAsReference`` sets.

    Args:
        pretrained: See :class:`CausalLM`, as for the rest.
        beta: How strongly the model is held to the reference. Default 0.1.

    Raises:
        ValueError: If ``beta`` is not positive.
    """

    def __init__(
        self,
        pretrained: str,
        gguf_file: str | None = None,
        beta: float = 0.1,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        super().__init__(pretrained, gguf_file, lr, weight_decay, warmup_steps, dtype, max_new_tokens)
        if beta <= 0:
            raise ValueError(f"Found beta={beta}, expected a positive number such as 0.1.")
        self.beta = beta
        self.reference: Callable[[], AbstractContextManager[Any]] | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        return self._loss(batch, "train_loss", sync_dist=False)

    def _loss(self, batch: dict[str, Tensor], name: str, sync_dist: bool) -> Tensor:
        rewards = self.beta * (self._log_probabilities(batch) - self._reference_log_probabilities(batch))
        chosen, rejected = rewards.chunk(2)
        margin = chosen - rejected
        loss = -logsigmoid(margin).mean()
        self.log(name, loss, batch_size=len(margin), prog_bar=True, sync_dist=sync_dist)
        if not self.training:
            values = {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
            for key, value in values.items():
                self.log(name.replace("loss", key), value, batch_size=len(margin), prog_bar=True, sync_dist=sync_dist)
        return loss

    @torch.no_grad()
    def _reference_log_probabilities(self, batch: dict[str, Tensor]) -> Tensor:
        if self.reference is None:
            raise ValueError(
                "DPO found no reference model, expected the callback lightning_lora.BaseAsReference beside "
                "LoRA, which makes the base under the adapters the reference. Add it to the trainer's callbacks."
            )
        with self.reference(), evaluating(self.model):
            return self._log_probabilities(batch)

    def _log_probabilities(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the log-probabilities of each row's label tokens, of shape ``(rows,)``."""
        return -label_losses(self.model, batch, forward=self).sum(-1)
