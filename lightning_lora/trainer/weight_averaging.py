"""Beside Lightning's weight averaging: its copies of the model must have the adapters in them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lora.class_names import is_a
from lightning_lora.model.freeze import FrozenNorm

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


def must_be_injected_early(trainer: "pl.Trainer", pl_module: "pl.LightningModule", lora: "Callback") -> bool:
    """Whether the adapters must be in before all callbacks are set up, since one of them then copies the model.

    ``WeightAveraging`` calls ``configure_model`` before it copies; ``StochasticWeightAveraging`` copies at once.

    Raises:
        ValueError: If such a callback stands before the ``LoRA`` callback, or copies the model before it is built.
    """
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    for position, callback in enumerate(callbacks):
        if not averages(callback):
            continue
        name = type(callback).__name__
        if position < callbacks.index(lora):
            raise ValueError(
                f"{name} stands before LoRA in the Trainer's callbacks, so it would average a copy of the model without"
                f" adapters: write callbacks=[LoRA(...), {name}(...)]."
            )
        if is_a(callback, "StochasticWeightAveraging"):
            if not type(pl_module).configure_model.__module__.endswith("core.hooks"):
                raise ValueError(
                    f"StochasticWeightAveraging copies the model before configure_model of {type(pl_module).__name__} "
                    "builds it: build it in __init__, or use WeightAveraging or EMAWeightAveraging."
                )
            return True
    return False


def keep_base_exact(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Have averages of equal values be that value, bit for bit, and frozen statistics stay as they are.

    An average such as ``0.9 * a + 0.1 * a`` rounds, and with it the frozen base would drift.

    Raises:
        ValueError: If frozen statistics would be estimated anew together with those of trained layers.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Lightning 2.6 keeps torch's AveragedModel in this attribute alone.
        averaged_model = getattr(callback, "_average_model", None)
        average = getattr(averaged_model, "avg_fn", None)
        if is_a(callback, "WeightAveraging") and average is not None:
            averaged_model.avg_fn = _exact_where_equal(average)  # type: ignore[union-attr]
        if is_a(callback, "StochasticWeightAveraging"):
            _keep_statistics(callback, pl_module)


def _keep_statistics(callback: Any, pl_module: "pl.LightningModule") -> None:
    """Have ``StochasticWeightAveraging`` add no epoch in which it estimates statistics, where all are frozen."""
    trained = [name for name, module in pl_module.named_modules() if _moves_statistics(module)]
    if trained and any(isinstance(module, FrozenNorm) for module in pl_module.modules()):
        raise ValueError(
            f"StochasticWeightAveraging estimates the statistics of all BatchNorm layers anew, those that are trained "
            f"(the first is {trained[0]!r}) and those that LoRA keeps frozen with the base: use WeightAveraging or "
            "EMAWeightAveraging."
        )
    callback.pl_module_contains_batch_norm = _any_moves_statistics


def _any_moves_statistics(pl_module: nn.Module) -> bool:
    return any(map(_moves_statistics, pl_module.modules()))


def _moves_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, FrozenNorm)


def _exact_where_equal(average: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def exact(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
        mean = average(averaged, current, count)
        return torch.where(averaged == current, averaged, mean.to(averaged.dtype))

    return exact


def averages(callback: Any) -> bool:
    """Whether a callback is one of Lightning's that average weights."""
    return is_a(callback, "StochasticWeightAveraging") or is_a(callback, "WeightAveraging")
