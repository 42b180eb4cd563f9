"""Beside Lightning's weight averaging: its copies of the model must have the adapters in them."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


def must_be_injected_early(trainer: "pl.Trainer", pl_module: "pl.LightningModule", lora: "Callback") -> bool:
    """Whether the adapters must be in before all callbacks are set up, since one of them then copies the model.

    ``WeightAveraging`` calls ``configure_model`` before it copies; ``StochasticWeightAveraging`` copies at once.

    Raises:
        ValueError: If such a callback stands before the ``LoRA`` callback, or would move frozen statistics.
    """
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    for position, callback in enumerate(callbacks):
        if not (_is_a(callback, "StochasticWeightAveraging") or _is_a(callback, "WeightAveraging")):
            continue
        name = type(callback).__name__
        if position < callbacks.index(lora):
            raise ValueError(
                f"{name} stands before LoRA in the Trainer's callbacks, so it would average a copy of the model without"
                f" adapters: write callbacks=[LoRA(...), {name}(...)]."
            )
        if _is_a(callback, "StochasticWeightAveraging"):
            if any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
                raise ValueError(
                    "StochasticWeightAveraging estimates the statistics of BatchNorm layers anew, which LoRA keeps "
                    "frozen with the base: use WeightAveraging or EMAWeightAveraging."
                )
            return True
    return False


def _is_a(callback: Any, class_name: str) -> bool:
    # By name, so that the callbacks of the package pytorch_lightning count too.
    return any(cls.__name__ == class_name for cls in type(callback).__mro__)
