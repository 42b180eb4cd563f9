"""Adapted layers get their classes back, and what is taken from them is kept to be put back."""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.fqn import base_modules
from lightning_lora.layers import LoraLayer, change_class, class_without_adapter
from lightning_lora.model.freeze import freeze, thaw
from lightning_lora.model.record import (
    Injection,
    adapted_layers,
    broken_injections,
    drop_record,
    give_root,
    injections,
    injections_of,
    injections_on,
    is_in,
    keep_record,
    own_injections,
)
from lightning_lora.sharding import is_sharded

MERGED, REMOVED = "merged", "removed"
_NOTE = "_injections"


@dataclasses.dataclass
class _Removed:
    """What was taken out of a merged model: all it takes to put it back."""

    injections: list[Injection]
    layers: list["_RemovedLayer"]

    def alive(self) -> list["_RemovedLayer"]:
        """The layers that are there still."""
        return [part for part in self.layers if part.layer() is not None]

    def fits(self) -> bool:
        """Whether it can be put back: no layer has taken on another class since, as parametrizations give it one."""
        return all(type(part.layer()) is part.own_class for part in self.alive())


@dataclasses.dataclass
class _RemovedLayer:
    layer: "weakref.ref[nn.Module]"
    own_class: type[nn.Module]
    layer_class: type[nn.Module]
    adapters: nn.ModuleDict
    attributes: dict[str, Any]


# By layer, and kept here, so that nothing of the plugin is left on a merged model itself, in memory or in files.
_removed: "weakref.WeakKeyDictionary[nn.Module, _Removed]" = weakref.WeakKeyDictionary()


def remove_all(root: nn.Module) -> _Removed:
    """Give all adapted layers of a root their classes back, and thaw the base; weights stay as they are."""
    found = list(injections_of(root))
    layers: dict[int, LoraLayer] = {}
    known = set(found)
    for injection in found:  # which grows by those that share layers with these and have another root
        for _, layer in injection.layers():
            if id(layer) not in layers:
                layers[id(layer)] = layer
                others = [other for other in injections_on(layer) if other not in known]
                found += others
                known.update(others)
    removed = _Removed(found, [_remove_class(layer) for layer in layers.values()])
    _forget_injections(removed.injections)
    return removed


def _forget_injections(gone: list[Injection]) -> None:
    """Thaw what they have frozen, but for what is in the base of others that stay."""
    for injection in gone:
        thaw(injection)
        drop_record(injection)
    stay = [other for each in gone for layer in adapted_layers(each.root) for other in injections_on(layer)]
    by_root = {other.living_root(): other for other in dict.fromkeys(stay)}  # any of a root freezes all of it
    for root, other in by_root.items():
        if root is not None:
            freeze(other)


def keep_removed(root: nn.Module, removed: _Removed) -> None:
    """Keep what was taken out of a merged model for :func:`restore`."""
    for earlier in _removed_at(root):
        _forget(earlier)
    for part in removed.layers:
        layer = part.layer()
        assert layer is not None  # it was taken out just now
        _removed[layer] = removed


def _forget(removed: _Removed) -> None:
    for layer in [layer for layer, found in _removed.items() if found is removed]:
        del _removed[layer]


def _removed_in(model: nn.Module, whole: bool = True) -> list[_Removed]:
    """What was taken out of a model, or also of one of which it is a part."""
    if not _removed:
        return []
    inside = {module for _, module in base_modules(model)}
    found = {id(removed): removed for module in inside if (removed := _removed.get(module)) is not None}
    return [removed for removed in found.values() if not whole or all(p.layer() in inside for p in removed.alive())]


def _removed_at(root: nn.Module) -> list[_Removed]:
    """What was taken out of a root, also if it was another then, which is gone or is another one around its layers."""
    return [
        removed
        for removed in _removed_in(root)
        if (living := removed.injections[0].living_root()) is root
        or living is None
        or not (is_in(living, root) or is_in(root, living))
    ]


def _remove_class(layer: LoraLayer) -> _RemovedLayer:
    """Give a layer its old class back, without the attributes that it had beside its adapters."""
    noted = {_NOTE: layer.__dict__.pop(_NOTE)} if _NOTE in layer.__dict__ else {}
    layer_class, adapters = type(layer), layer.lora
    own_class, attributes = layer.end(class_without_adapter(layer))
    change_class(layer, own_class)
    return _RemovedLayer(weakref.ref(layer), own_class, layer_class, adapters, attributes | noted)


def remove_adapter(injection: Injection) -> None:
    """Take one adapter out, and leave the others."""
    for _, layer in injection.layers():
        if injection.adapter_name in layer.lora:  # else it is tied to one before, whose adapters it shares
            del layer.lora[injection.adapter_name]
        layer.active = (name for name in layer.active if name != injection.adapter_name)
        if not layer.lora:
            _remove_class(layer)
    injection.switch(False)
    _forget_injections([injection])


def is_removed(model: nn.Module) -> bool:
    """Whether adapters were merged into this model and taken out."""
    return bool(_removed_in(model))


def is_finished(model: nn.Module) -> bool:
    """Whether all adapters of a model are merged and taken out, so that it is a plain one."""
    return is_removed(model) and not injections(model)


def removed_injections(root: nn.Module) -> list[Injection]:
    """The injections that were merged into this very module and taken out."""
    return [injection for removed in _removed_at(root) for injection in removed.injections]


def how_merged(root: nn.Module) -> str | None:
    """How adapters are merged into this very module, with layers adapted still or not; ``None`` if they are not."""
    if _removed_at(root):
        return REMOVED
    merged = injections_of(root) and any(layer.merged for layer in adapted_layers(root))
    return MERGED if merged else None


def forget_removed(root: nn.Module) -> list[dict[str, Any]]:
    """Take the weights of a merged model for a base of its own.

    Returns:
        What lies merged in it now: name and settings of each adapter, the first merged first, in plain types.
    """
    earlier = _removed_at(root)
    for removed in earlier:
        _forget(removed)
    return [entry for removed in earlier for injection in removed.injections for entry in injection.as_beneath()]


def restore(model: nn.Module) -> None:
    """Put adapters that were merged and taken out back into their layers, which stay merged.

    Those whose layers have another class by now are let go. It is for the caller to have those let go whose weights
    were changed since; see :func:`let_go_if_changed`.
    """
    for removed in _removed_in(model):
        _forget(removed)
        if not removed.fits():
            _tell_let_go(model, removed.injections)
            continue
        for part in removed.alive():
            layer: Any = part.layer()
            change_class(layer, part.layer_class)
            layer.__dict__.update(part.attributes)
            layer.lora = part.adapters
            device = next(iter(layer.adapted_parameters().values())).device
            if device.type != "meta" and not is_sharded(layer.lora):
                layer.lora.to(device)
        for injection in removed.injections:
            if injection.living_root() is None:
                give_root(injection, model)
        for injection in removed.injections:
            freeze(injection)
        for injection in removed.injections:
            keep_record(injection)
            for tensor in injection.tensors(injection.trained).values():
                tensor.requires_grad_(injection.in_place)


def let_go_if_changed(root: nn.Module) -> None:
    """Take all adapters out of a model whose merged weights were changed since: there is no way back to its base."""
    if not injections_of(root) or all(layer.is_as_merged() for layer in adapted_layers(root)):
        return
    gone = list(injections_of(root))
    remove_all(root)
    _tell_let_go(root, gone)


def _tell_let_go(root: nn.Module, gone: list[Injection]) -> None:
    names = ", ".join(repr(injection.adapter_name) for injection in gone)
    rank_zero_warn(
        f"The weights of this {type(root).__name__} were changed after the adapter {names} was merged into them, so "
        "the adapter is let go: what the model has now is its base."
    )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Have the adapters of a merged model in their layers meanwhile, without a change of any weight."""
    found = _removed_in(model)
    restore(model)
    roots = [removed.injections[0].root for removed in found]
    for root in roots:
        let_go_if_changed(root)
    try:
        yield
    finally:
        for root in roots:
            if injections_of(root):
                keep_removed(root, remove_all(root))


def require_whole(model: nn.Module, if_merged: bool = False) -> None:
    """Require that no adapter, or none that is merged, has some of its layers in a model and others elsewhere.

    Raises:
        ValueError: Naming the module that has all of them.
    """
    broken = broken_injections(model)
    if if_merged:
        broken = [found for found in broken if any(layer.merged for _, layer in found.layers())]
    whole = list(map(id, _removed_in(model)))
    for removed in _removed_in(model, whole=False):
        broken += [] if id(removed) in whole else removed.injections
    if broken:
        root = broken[0].living_root()
        raise ValueError(
            f"Only a part of the layers of the adapter {broken[0].adapter_name!r} is in this {type(model).__name__}: "
            f"call it on the {'module' if root is None else type(root).__name__} that has all of them, or on an "
            "nn.ModuleList of those that do. Nothing was changed."
        )


def require_adapters(model: nn.Module, what: str) -> list[Injection]:
    """The injections in a model.

    Raises:
        ValueError: If there is none, or one is in this model in part.
    """
    require_whole(model)
    found = own_injections(model)
    if not found:
        raise ValueError(f"There is no adapter {what} in this {type(model).__name__}: inject or load one first.")
    return found
