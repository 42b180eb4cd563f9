"""``AdapterMonitor``: how much of its rank each group of layers uses, how far it moves its weights, and advice."""

import math
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lora.fqn import group_of
from lightning_lora.layers.spectrum import Factors, inner
from lightning_lora.model.advice import advice_on
from lightning_lora.model.learned import Learner, learners
from lightning_lora.sharding import is_sharded

_DEAD = 1e-3  # of the largest component


class AdapterMonitor(Callback):
    """Log what adapters learn, by groups of layers of one name, and say at the end of a fit what to try next.

    Every figure comes from A and B by matrices of the rank's size. To each of the Trainer's loggers go, as means over
    a group such as ``q_proj``: ``adapter/q_proj/update_norm`` and ``update_spectral_norm`` (of the scaled update,
    relative to the Frobenius norm of the weight), ``effective_rank`` and ``stable_rank``, ``dead_components`` (share
    of the rank's components below a thousandth of the largest), ``update_cosine`` (between what was learned since the
    last look and before it), and of the whole group ``grad_norm_A`` and ``grad_norm_B``. Kinds of adapters whose
    update is not a product of two matrices are left out. Where PEFT has wrapped the model, its active adapters are
    looked at.

    Args:
        every_n_steps: How often to look, in steps of optimizers. Default 50.

    Raises:
        ValueError: If ``every_n_steps`` is not positive, or, when ``fit`` starts, if there is no adapter.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"AdapterMonitor found every_n_steps={every_n_steps}, expected 1 or more.")
        self.every_n_steps = every_n_steps
        self.advice: list[str] = []
        self._learners: list[Learner] = []
        self._looked_at = 0
        self._before: dict[Learner, list[Factors]] = {}
        self._gradients: dict[str, float] = {}

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the adapters, which are all in by now, and the norms of the weights."""
        self._learners = learners(pl_module)
        if not self._learners:
            raise ValueError(
                "AdapterMonitor found no adapter to look at, expected layers that LoRA(...) beside it has adapted, or "
                "LoRA layers of PEFT under that. Add LoRA(...), or take out the monitor."
            )
        self._looked_at, self._before, self.advice = trainer.global_step, {}, []

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the gradients' norms of the step at which a look is due."""
        if trainer.loggers and trainer.global_step + 1 >= self._looked_at + self.every_n_steps:
            self._gradients = self._gradient_norms(is_sharded(pl_module))

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *args: Any) -> None:
        """Look, every so many steps."""
        if trainer.loggers and trainer.global_step >= self._looked_at + self.every_n_steps:
            self._looked_at = trainer.global_step
            figures = {**self._figures(), **self._gradients}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say what the figures advise, before the adapters are merged."""
        updates = [looked[0] for each in self._learners if (looked := each.look()) is not None]
        self.advice = advice_on(updates)
        if self.advice:
            rank_zero_info("\n".join(["What the adapters learned:", *(f"- {line}" for line in self.advice)]))
        self._before = {}

    def card_facts(self) -> dict[str, str]:
        """What the card of an exported adapter says."""
        return {"what it learned": " ".join(self.advice)} if self.advice else {}

    def _figures(self) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for learner in self._learners:
            looked = learner.look()
            if looked is None:
                continue
            update, factors = looked
            spectrum, weight_norm = update.spectrum, update.weight_norm
            figures: dict[str, float | None] = {
                "update_norm": weight_norm and spectrum.norm / weight_norm,
                "update_spectral_norm": weight_norm and spectrum.largest / weight_norm,
                "effective_rank": spectrum.effective_rank,
                "stable_rank": spectrum.stable_rank,
            }
            if factors is not None:
                figures["dead_components"] = dead_components(factors)
                figures["update_cosine"] = self._cosine(learner, factors)
            for name, value in figures.items():
                if value is not None:
                    found.setdefault(f"adapter/{group_of(learner.layer)}/{name}", []).append(value)
        return {name: fmean(each) for name, each in found.items()}

    def _cosine(self, learner: Learner, factors: Factors) -> float | None:
        """Between the latest change of the update and the one before it."""
        before = self._before.setdefault(learner, [])
        before.append(factors)
        if len(before) < 3:
            return None
        zero, one, two = before
        del before[0]
        # <two - one, one - zero>, where each stands for its product
        oo, oz, ot = inner(one, one), inner(one, zero), inner(one, two)
        product = ot - inner(two, zero) - oo + oz
        squares = (inner(two, two) - 2 * ot + oo) * (oo - 2 * oz + inner(zero, zero))
        return product / math.sqrt(squares) if squares > 0 else None

    def _gradient_norms(self, sharded: bool) -> dict[str, float]:
        squares: dict[str, Tensor] = {}
        for learner in self._learners:
            for matrix, parameter in learner.parameters():
                key = f"adapter/{group_of(learner.layer)}/grad_norm_{matrix}"
                before = squares.get(key, torch.zeros((), device=parameter.device))
                # A process whose slice is empty has no gradient.
                squares[key] = before if parameter.grad is None else before + _square(parameter.grad)
        if not squares:
            return {}
        total = torch.stack(list(squares.values()))
        if sharded and not any(isinstance(p, DTensor) for each in self._learners for _, p in each.parameters()):
            dist.all_reduce(total)  # under FSDPStrategy each process has a slice
        return dict(zip(squares, total.sqrt().tolist()))


def _square(gradient: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(gradient.detach().float())
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2


def dead_components(factors: Factors) -> float:
    """The share of the rank's components that are below a thousandth of the largest; all of an update of zero."""
    A, B = (factor.detach().flatten(1).float() for factor in factors)
    sizes = A.norm(dim=1) * B.norm(dim=0)
    return float((sizes <= _DEAD * sizes.max()).float().mean())
