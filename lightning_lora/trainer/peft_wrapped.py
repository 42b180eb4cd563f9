"""A run whose adapters PEFT has put in: the ``LoRA`` callback takes them for its own, or says why it cannot."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_lora.model.peft_wrapped import adopt_peft, unmergeable_reason
from lightning_lora.model.targets import TargetError
from lightning_lora.trainer import quantized_base
from lightning_lora.trainer.sharded_strategy import keeps_whole_model

_OF_OWN = ("adapter", "base_dtype")


def adopt_wrapped(lora: Any, pl_module: "pl.LightningModule", wrapped: Mapping[str, nn.Module]) -> None:
    """Have a ``LoRA`` callback take PEFT's adapters for its own.

    Args:
        lora: The callback, without settings of an adapter.
        pl_module: The module of its run.
        wrapped: The models in it that PEFT has wrapped, by name.

    Raises:
        TargetError: If there are several, or one that cannot be adopted.
        ValueError: If the callback or the strategy is told to do what can only be done with adapters of this package.
    """
    if len(wrapped) > 1:
        raise TargetError(
            f"PEFT has wrapped {', '.join(map(repr, wrapped))}: name one by LoRA(module=...), and give each that is "
            "trained a LoRA callback of its own. Nothing was changed."
        )
    (root,) = wrapped.values()
    given = [name for name in _OF_OWN if getattr(lora, name) is not None]
    if given:
        raise ValueError(
            f"LoRA({given[0]}=...) is for adapters of this package, and PEFT has wrapped this model: load adapters by "
            "PeftModel.from_pretrained(..., is_trainable=True), and the base in its dtype. Nothing was changed."
        )
    reason = unmergeable_reason(root) if lora.export_dir is not None and lora.merge is not None else None
    if reason is not None:
        raise ValueError(f"merged/ cannot be written: {reason}. Use merge=None, and adapter/ is. Nothing was changed.")
    strategy = pl_module.trainer.strategy
    if not keeps_whole_model(strategy):
        raise ValueError(
            f"{type(strategy).__name__} shards the model, and PEFT's adapters are supported on one device and in "
            "ddp alone: use LoRA(r=..., target_modules=...) on the model without PEFT. Nothing was changed."
        )
    adopt_peft(root, lora.config, lora.adapter_name)
    quantized_base.quantize_now(pl_module.trainer, pl_module)
    quantized_base.require_compatible(pl_module.trainer, root)
    quantized_base.leave_out_of_ddp(pl_module.trainer, pl_module)
