"""Quantized bases beside Lightning's precision plugins: quantized before the adapters come, and cast by none."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_lora.class_names import is_a
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.model.record import injections
from lightning_lora.trainer.sharded_strategy import keeps_whole_model

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class _Ignored(list[str]):
    """What DDP is not to send: what the module itself says, if it does, and more."""

    def __init__(self, own: list[str] | None, more: list[str]) -> None:
        super().__init__([*(own or ()), *more])
        self.own = own


def leave_to_building(trainer: "pl.Trainer") -> None:
    """Have ``BitsandbytesPrecision`` wait with what it does around ``configure_model`` for :func:`building`.

    It has ``torch.nn.Linear`` be another class there, which is for what a module builds. Adapters come right after, in
    a ``configure_model`` that the object gets; and with ``ignore_modules``, it refuses any that has one.
    """
    if _quantizes(trainer.precision_plugin):
        vars(trainer.precision_plugin)["module_init_context"] = nullcontext


def as_before(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Undo :func:`leave_to_building` and :func:`leave_out_of_ddp`."""
    ignored = vars(pl_module).get(_IGNORED)
    if isinstance(ignored, _Ignored):
        del vars(pl_module)[_IGNORED]
        if ignored.own is not None:
            vars(pl_module)[_IGNORED] = ignored.own
    if _quantizes(trainer.precision_plugin):
        vars(trainer.precision_plugin).pop("module_init_context", None)


def building(pl_module: "pl.LightningModule", has_own: bool) -> AbstractContextManager[None]:
    """What the precision plugin does around ``configure_model``, if the module has one."""
    plugin: Any = pl_module.trainer.precision_plugin
    if has_own and _quantizes(plugin):
        context: AbstractContextManager[None] = type(plugin).module_init_context(plugin)
        return context
    return nullcontext()


def quantize_now(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Do what the strategy would do to a base after the adapters are in: let the precision plugin quantize it.

    Bitsandbytes quantizes a layer when it is moved, so layers that are still to be quantized are moved to where the
    strategy has its model.

    Raises:
        ValueError: If adapters are in layers that the plugin puts others in the place of.
    """
    plugin: Any = trainer.precision_plugin
    if _quantizes(plugin):
        found = injections(pl_module)
        if found and not any(injection.quantization for injection in found):
            raise ValueError(
                "BitsandbytesPrecision puts quantized layers in the place of those that have adapters already: leave "
                "it to the LoRA callback to inject, or quantize the model before inject."
            )
        plugin.convert_module(pl_module)
    for _, module, storage, packed in quantized_layers(pl_module):
        if not storage.is_ready(module, packed):
            module.to(trainer.strategy.root_device)


def require_compatible(trainer: "pl.Trainer", root: nn.Module) -> None:
    """Require that the strategy can share packed weights, if it does, and that the precision plugin suits them.

    Raises:
        ValueError: If one would destroy them, or they could not be computed with.
    """
    shards = not keeps_whole_model(trainer.strategy)
    dtype, precision = _cast_to(trainer.precision_plugin), str(trainer.precision_plugin.precision)
    inputs = dtype or _MIXED.get(precision)
    for name, module, storage, packed in quantized_layers(root):
        reason = storage.unshardable_reason(packed, is_a(trainer.strategy, "FSDPStrategy")) if shards else None
        if reason is not None:
            raise ValueError(
                f"{type(trainer.strategy).__name__} shards the model, and the weight of {name!r} is quantized: "
                f"{reason}. Nothing was changed."
            )
        kept = storage.cast_with(module, packed)
        if dtype is not None and kept not in (None, dtype):
            raise ValueError(
                f"The bits of the quantized {name!r} are kept in {kept}, and precision="
                f"{precision!r} would cast them to {dtype}, which destroys them: use "
                f"bnb_4bit_quant_storage={dtype}, torch.uint8 without FSDP, or a mixed precision. Nothing was changed."
            )
        only = storage.only_dtype(module, packed)
        if inputs is not None and only not in (None, inputs):
            raise ValueError(
                f"The quantized {name!r} computes in {only} alone, and precision={precision!r} has it get {inputs}, of "
                f"which it has no backward pass: quantize it for {inputs} (compute_dtype), or use the precision that "
                "it was made for. Nothing was changed."
            )


def leave_out_of_ddp(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Have DDP not send packed weights that it cannot send from the first process to the others.

    Every process has read the same ones.
    """
    kept = ((name, packed) for name, _, storage, packed in quantized_layers(pl_module) if not storage.broadcasts)
    names = [f"{name}.{part}" for name, packed in kept for part, value in packed.items() if isinstance(value, Tensor)]
    if names and is_a(trainer.strategy, "DDPStrategy"):
        # The only way to say so, also to torch's own _set_params_and_buffers_to_ignore_for_model.
        vars(pl_module)[_IGNORED] = _Ignored(vars(pl_module).get(_IGNORED), names)


def _quantizes(plugin: Any) -> bool:
    return is_a(plugin, "BitsandbytesPrecision")


def _cast_to(plugin: Any) -> torch.dtype | None:
    """What a precision plugin casts the parameters of a model to, ``None`` if it leaves them."""
    if is_a(plugin, "FSDPPrecision"):
        dtype: torch.dtype | None = plugin.mixed_precision_config.param_dtype
        return dtype
    return _TRUE.get(str(plugin.precision))
