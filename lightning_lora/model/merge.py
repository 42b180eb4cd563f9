"""Fold adapters into the weights, and bring the base weights back bit for bit."""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from lightning_lora.model.eject import is_folded, merged_weights, restore_folded
from lightning_lora.model.multi_adapter import set_adapter
from lightning_lora.model.record import adapted_layers, injections
from lightning_lora.sharding import reshard

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def merge(model: ModuleT, adapter_names: str | Sequence[str] | None = None) -> ModuleT:
    """Fold the adapters into the weights, in place: ``W = W0 + scaling * B A``, so that inference costs nothing extra.

    The adapters stay in their layers, at rest, and the base weights stay in memory for :func:`unmerge`. To get a model
    with no trace of LoRA in it, use ``eject(model, merge=True)``. Merging twice changes nothing.

    Args:
        model: A model with adapters.
        adapter_names: Which to fold in, one or several; they are at work from now on. ``None`` is those that are.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no adapter, a name is unknown, or a merged weight holds a NaN or an infinity. Nothing is
            changed then.
    """
    found = list(injections(model))
    if not found:
        if is_folded(model):
            return model
        raise ValueError(f"There is no adapter to merge in this {type(model).__name__}: inject or load one first.")
    if adapter_names is not None:
        set_adapter(model, adapter_names)
    layers = [layer for _, root, injection in found for _, layer in adapted_layers(root, injection) if not layer.merged]
    reshard(model)
    merged = merged_weights(model, layers)
    for layer in {id(layer): layer for layer in layers}.values():
        layer.merge(merged[id(layer.lora)])
    return model


def unmerge(model: ModuleT) -> ModuleT:
    """Bring the base weights back, bit for bit, and the adapters to work, after :func:`merge` or ``eject(merge=True)``.

    Args:
        model: A merged model; one that is not merged is left as it is.

    Returns:
        The same model.
    """
    restore_folded(model)
    for _, root, injection in injections(model):
        for _, layer in adapted_layers(root, injection):
            if layer.merged:
                layer.unmerge()
    return model
