"""Preference tuning of a causal language model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_lora.eval_mode import evaluating
from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.label_losses import IGNORED, label_losses
from lightning_lora.tasks.preference_losses import LOSSES, Answers, PreferenceLoss, mismatched


class DPO(CausalLM):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290), or another loss of pairs of answers.

    A batch holds chosen answers in its first half and rejected ones in its second, as
    :class:`~lightning_lora.data.PreferenceData` makes it. Logged are ``train_loss`` and ``val_loss`` (of DPO 0.693
    where the model is the reference), ``val_accuracy`` (share of pairs whose chosen answer has the greater reward) and
    ``val_margin`` (mean difference of the two rewards). A reward is beta times what an answer's log-probability gained
    over the reference; of ORPO and SimPO, which have none, times the mean log-probability of its tokens.

    The reference is this very model with its adapters switched off, so that there is no second copy in memory. What
    switches them off is :attr:`reference`, which the callback ``lightning_lora.BaseAsReference`` sets.

    Args:
        pretrained: See :class:`CausalLM`, as for the rest.
        beta: How strongly the model is held to the reference, IPO's tau, ORPO's lambda, or SimPO's scale of rewards.
            Default ``None``: 0.1, and 2 for SimPO.
        loss: ``dpo`` (default), ``ipo``, ``kto`` (of the chosen as desirable and the rejected as not), ``orpo`` or
            ``simpo``; see :mod:`lightning_lora.tasks.preference_losses`.
        gamma: SimPO's margin between rewards. Default 1.

    Raises:
        ValueError: If ``beta`` is not positive, or there is no such loss.
    """

    def __init__(
        self,
        pretrained: str,
        gguf_file: str | None = None,
        beta: float | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str | None = None,
        max_new_tokens: int = 128,
        loss: PreferenceLoss = "dpo",
        gamma: float = 1.0,
    ) -> None:
        super().__init__(pretrained, gguf_file, lr, weight_decay, warmup_steps, dtype, max_new_tokens)
        if loss not in LOSSES:
            raise ValueError(f"Found loss={loss!r}, expected one of {', '.join(LOSSES)}.")
        if beta is not None and beta <= 0:
            raise ValueError(f"Found beta={beta}, expected a positive number such as 0.1.")
        self.kind = LOSSES[loss]
        self.beta = self.kind.beta if beta is None else beta
        self.gamma = gamma
        self.loss = loss
        self.reference: Callable[[], AbstractContextManager[Any]] | None = None

    def on_fit_start(self) -> None:
        """Make sure that a batch has answers to other questions where the loss needs them.

        Raises:
            ValueError: If it has one pair alone, and as in the base class.
        """
        super().on_fit_start()
        if self.loss == "kto" and getattr(getattr(self.trainer, "datamodule", None), "batch_size", 2) < 2:
            raise ValueError("Found loss='kto' and batch_size=1, expected two pairs or more. Raise data.batch_size.")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        return self._loss(batch, "train_loss", sync_dist=False)

    def _loss(self, batch: dict[str, Tensor], name: str, sync_dist: bool) -> Tensor:
        losses, rewards = self.kind.compute(self._answers(batch), self.beta, self.gamma)
        chosen, rejected = rewards.chunk(2)
        margin = chosen - rejected
        loss = losses.mean()
        self.log(name, loss, batch_size=len(margin), prog_bar=True, sync_dist=sync_dist)
        if not self.training:
            values = {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
            for key, value in values.items():
                self.log(name.replace("loss", key), value, batch_size=len(margin), prog_bar=True, sync_dist=sync_dist)
        return loss

    def _answers(self, batch: dict[str, Tensor]) -> Answers:
        policy = self._log_probabilities(batch)
        gains, divergence = torch.zeros_like(policy), policy.new_zeros(())
        if self.kind.has_reference:
            gains = policy - self._reference_log_probabilities(batch)
        if self.loss == "kto" and len(policy) > 2:  # of one pair alone, no question has another's answer
            others = mismatched(batch)
            with torch.no_grad():
                gained = self._log_probabilities(others) - self._reference_log_probabilities(others)
            divergence = gained.mean().clamp(min=0)
        return Answers(policy, (batch["labels"] != IGNORED).sum(-1), gains, divergence)

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
