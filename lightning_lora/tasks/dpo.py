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

    ``kto`` learns from single answers too, of a batch with ``desirable``, of shape ``(answers,)``, and takes a pair for
    a desirable and an undesirable one. Of single ones, ``val_accuracy`` is the share whose reward is positive if they
    are desirable and negative if not, and ``val_margin`` the mean of that reward, with the other sign if they are not.

    The reference is this very model with its adapters switched off, so that there is no second copy in memory. What
    switches them off is :attr:`reference`, which the callback ``lightning_lora.BaseAsReference`` sets.

    Args:
        pretrained: See :class:`CausalLM`, as for the rest.
        beta: How strongly the model is held to the reference, IPO's tau, ORPO's lambda, or SimPO's scale of rewards.
            Default ``None``: 0.1, and 2 for SimPO.
        loss: ``dpo`` (default), ``ipo``, ``kto``, ``orpo`` or ``simpo``; see
            :mod:`lightning_lora.tasks.preference_losses`.
        gamma: SimPO's margin between rewards. Default 1.
        desirable_weight: What KTO's loss of desirable answers is multiplied by. Where there are fewer of them, its
            authors advise from 1 to 4/3 times the other weight times the ratio of the numbers. Default 1.
        undesirable_weight: The same of the others. Default 1.

    Raises:
        ValueError: If ``beta`` or a weight is not positive, or there is no such loss.
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
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__(pretrained, gguf_file, lr, weight_decay, warmup_steps, dtype, max_new_tokens)
        if loss not in LOSSES:
            raise ValueError(f"Found loss={loss!r}, expected one of {', '.join(LOSSES)}.")
        if beta is not None and beta <= 0:
            raise ValueError(f"Found beta={beta}, expected a positive number such as 0.1.")
        for name, weight in {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
            if weight <= 0:
                raise ValueError(f"Found {name}={weight}, expected a positive number such as 1.")
        self.kind = LOSSES[loss]
        self.beta = self.kind.beta if beta is None else beta
        self.gamma = gamma
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.loss = loss
        self.reference: Callable[[], AbstractContextManager[Any]] | None = None

    @property
    def takes_single_answers(self) -> bool:
        """Whether the loss learns from answers without a pair, which a data module may ask."""
        return self.loss == "kto"

    def on_fit_start(self) -> None:
        """Make sure that a batch has answers to other questions where the loss needs them.

        Raises:
            ValueError: If it has one row alone, and as in the base class.
        """
        super().on_fit_start()
        if self.loss == "kto" and getattr(getattr(self.trainer, "datamodule", None), "batch_size", 2) < 2:
            raise ValueError("Found loss='kto' and batch_size=1, expected two rows or more. Raise data.batch_size.")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        return self._loss(batch, "train_loss", sync_dist=False)

    def _loss(self, batch: dict[str, Tensor], name: str, sync_dist: bool) -> Tensor:
        single = batch.get("desirable")
        if single is not None and not self.takes_single_answers:
            raise ValueError(f"Found answers without a pair and loss={self.loss!r}, expected pairs, or loss='kto'.")
        batch = {field: value for field, value in batch.items() if field != "desirable"}
        answers = self._answers(batch, single)
        losses, rewards = self.kind.compute(answers, self.beta, self.gamma)
        margin = torch.where(answers.desirable, rewards, -rewards)
        if single is None:
            margin = margin.view(2, -1).sum(0)
        loss = losses.mean()
        self.log(name, loss, batch_size=len(margin), prog_bar=True, sync_dist=sync_dist)
        if not self.training:
            values = {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
            for key, value in values.items():
                self.log(name.replace("loss", key), value, batch_size=len(margin), prog_bar=True, sync_dist=sync_dist)
        return loss

    def _answers(self, batch: dict[str, Tensor], single: Tensor | None) -> Answers:
        policy = self._log_probabilities(batch)
        gains, divergence = torch.zeros_like(policy), policy.new_zeros(())
        if self.kind.has_reference:
            gains = policy - self._reference_log_probabilities(batch)
        if self.loss == "kto":
            gained = policy.new_zeros(0)
            if len(policy) > (2 if single is None else 1):  # of one row alone, no question has another's answer
                gained = self._gained_by_others(batch)
            divergence = self._mean_of_processes(gained).clamp(min=0)
        desirable = torch.arange(len(policy), device=policy.device) < len(policy) // 2 if single is None else single
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(policy)
        return Answers(policy, (batch["labels"] != IGNORED).sum(-1), gains, divergence, desirable, weights)

    @torch.no_grad()
    def _gained_by_others(self, batch: dict[str, Tensor]) -> Tensor:
        others = mismatched(batch)
        return self._log_probabilities(others) - self._reference_log_probabilities(others)

    def _mean_of_processes(self, values: Tensor) -> Tensor:
        """The mean over the batches of all processes, which make one step together; 0 of none."""
        total = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
        trainer: Any = self._trainer  # none outside of a run
        if trainer is not None:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        return total[0] / total[1].clamp(min=1)

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
