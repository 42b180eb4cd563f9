"""Adapted layers get their classes back, and what is taken from them is kept to be put back."""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.layers import LoraLayer, change_class, class_without_adapter
from lightning_lora.model.freeze import freeze, hand_over, thaw
from lightning_lora.model.record import Injection, drop_record, injections, injections_of, keep_record
from lightning_lora.sharding import is_sharded

ModuleT = TypeVar("ModuleT", bound=nn.Module)

MERGED, REMOVED = "merged", "removed"
_ATTRIBUTES = ("_active", "_merged", "_aside", "_seals", "_rows")


@dataclasses.dataclass
class _Removed:
    """What was taken out of a merged model: all it takes to put it back."""

    injections: list[Injection]
    layers: list["_RemovedLayer"]


@dataclasses.dataclass
class _RemovedLayer:
    layer: "weakref.ref[nn.Module]"
    layer_class: type[nn.Module]
    adapters: nn.ModuleDict
    attributes: dict[str, Any]


# Kept here, so that nothing of the plugin is left on a merged model itself, in memory or in files.
_removed: "weakref.WeakKeyDictionary[nn.Module, _Removed]" = weakref.WeakKeyDictionary()


def remove_all(root: nn.Module) -> _Removed:
    """Give all adapted layers of a root their classes back, and thaw the base; weights stay as they are."""
    found = injections_of(root)
    layers = {id(layer): layer for injection in found for _, layer in injection.layers()}.values()
    removed = _Removed(list(found), [_remove_class(layer) for layer in layers])
    for injection in removed.injections:
        thaw(injection)
        drop_record(injection)
    return removed


def keep_removed(root: nn.Module, removed: _Removed) -> None:
    """Keep what was taken out of a merged model for :func:`restore`."""
    _removed[root] = removed


def _remove_class(layer: LoraLayer) -> _RemovedLayer:
    """Give a layer its old class back, without the attributes that it had beside its adapters."""
    attributes = {name: layer.__dict__.pop(name) for name in _ATTRIBUTES}
    removed = _RemovedLayer(weakref.ref(layer), type(layer), layer.lora, attributes)
    del layer.lora
    change_class(layer, class_without_adapter(layer))
    return removed


def remove_adapter(injection: Injection) -> None:
    """Take one adapter out, and leave the others."""
    for _, layer in injection.layers():
        if injection.adapter_name in layer.lora:  # else it is tied to one before, whose adapters it shares
            del layer.lora[injection.adapter_name]
        layer.active = (name for name in layer.active if name != injection.adapter_name)
        if not layer.lora:
            _remove_class(layer)
    injection.switch(False)
    others = [other for other in injections_of(injection.root) if other is not injection]
    if others:  # what was frozen with this one is thawed with the last one
        hand_over(injection, others[0])
    else:
        thaw(injection)
    drop_record(injection)


def is_removed(model: nn.Module) -> bool:
    """Whether adapters were merged into this model and taken out."""
    return bool(_removed) and any(module in _removed for module in model.modules())


def removed_injections(root: nn.Module) -> list[Injection]:
    """The injections that were merged into this very module and taken out."""
    return list(_removed[root].injections) if root in _removed else []


def how_merged(root: nn.Module) -> str | None:
    """How adapters are merged into this very module, with layers adapted still or not; ``None`` if they are not."""
    if root in _removed:
        return REMOVED
    layers = (layer for injection in injections_of(root) for _, layer in injection.layers())
    return MERGED if any(layer.merged for layer in layers) else None


def forget_removed(root: nn.Module) -> list[dict[str, Any]]:
    """Take the weights of a merged model for a base of its own.

    Returns:
        What lies merged in it now: name and settings of each adapter, the first merged first, in plain types.
    """
    return [entry for injection in _removed.pop(root).injections for entry in injection.as_beneath()]


def restore(model: nn.Module) -> None:
    """Put adapters that were merged and taken out back into their layers, which stay merged.

    Where weights were changed since, those adapters are let go: what is there now is a base of its own.
    """
    for root in [module for module in model.modules() if module in _removed]:
        removed = _removed.pop(root)
        for part in removed.layers:
            layer: Any = part.layer()
            change_class(layer, part.layer_class)
            layer.__dict__.update(part.attributes)
            layer.lora = part.adapters
            device = next(iter(layer.adapted_parameters().values())).device
            if device.type != "meta" and not is_sharded(layer.lora):
                layer.lora.to(device)
        for injection in removed.injections:
            freeze(injection)
        for injection in removed.injections:
            keep_record(injection)
            for name in injection.trained:
                injection.tensor(name).requires_grad_(injection.in_place)
        if not all(layer.is_as_merged() for injection in removed.injections for _, layer in injection.layers()):
            let_go(root)


def let_go(root: nn.Module) -> None:
    """Take all adapters out of a model whose merged weights were changed since: there is no way back to its base."""
    names = ", ".join(repr(injection.adapter_name) for injection in injections_of(root))
    remove_all(root)
    rank_zero_warn(
        f"The weights of this {type(root).__name__} were changed after the adapter {names} was merged into them, so "
        "the adapter is let go: what the model has now is its base."
    )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Have the adapters of a merged model in their layers meanwhile, without a change of any weight."""
    roots = [module for module in model.modules() if module in _removed]
    restore(model)
    try:
        yield
    finally:
        for root in roots:
            if injections_of(root):
                keep_removed(root, remove_all(root))


def require_adapters(model: nn.Module, what: str) -> list[Injection]:
    """The injections in a model.

    Raises:
        ValueError: If there is none.
    """
    found = injections(model)
    if not found:
        raise ValueError(f"There is no adapter {what} in this {type(model).__name__}: inject or load one first.")
    return found
