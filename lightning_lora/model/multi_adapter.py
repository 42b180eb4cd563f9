"""Many adapters on one base: add them, choose which are active, delete them. The base's weights never move."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import TypeVar

from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers import LoraLayer, rows_of
from lightning_lora.model.inject import inject
from lightning_lora.model.recompute import keep_adapters
from lightning_lora.model.record import Injection, adapted_layers, injections, own_injections
from lightning_lora.model.removed import is_removed, remove_adapter, require_whole
from lightning_lora.sharding import is_sharded

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters in a model: their names and settings, in the order in which they were put in."""
    return {injection.adapter_name: injection.config for injection in injections(model)}


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters."""
    layers, found = _parts(model)
    active = {name for layer in layers for name in layer.active}
    active |= {injection.adapter_name for injection in found if injection.trained and injection.in_place}
    return [name for name in adapters(model) if name in active]


def add_adapter(model: ModuleT, config: LoraConfig, adapter_name: str) -> ModuleT:
    """Put a further adapter beside those that a model has; it is not active until :func:`set_adapter` says so.

    Args:
        model: A model with or without adapters.
        config: What to adapt and how; not necessarily the same layers as the others.
        adapter_name: A new name.

    Returns:
        The same model.

    Raises:
        TargetError: If the config does not fit the model, or the name is taken. Nothing is changed then.
    """
    before = active_adapters(model)
    set_adapter(model, None)  # so that the new adapter copies the base's own of what it trains in full
    try:
        inject(model, config, adapter_name)
    finally:
        set_adapter(model, before)
    return model


def set_adapter(model: ModuleT, adapter_names: str | Sequence[str] | None) -> ModuleT:
    """Choose which adapters are active, at once and without touching a weight.

    Args:
        model: A model with adapters, unmerged.
        adapter_names: One name, several (their updates add up), or ``None`` for the base alone.

    Returns:
        The same model.

    Raises:
        ValueError: If a name is unknown, the adapters are merged, or the chosen ones cannot work together. Nothing is
            changed then.
    """
    layers, found = _parts(model)
    if adapter_names:
        require_whole(model)
    names = _checked(adapter_names, found)
    _require_unmerged(model, layers)
    _require_compatible([injection for injection in found if injection.adapter_name in names])
    keep_adapters(model)
    for layer in layers:
        layer.active = (name for name in names if name in layer.lora._modules)
    # First all of the base's own back, then the chosen ones in, which may be for the same modules.
    for chosen in (False, True):
        for injection in found:
            if injection.in_place is not chosen and (injection.adapter_name in names) is chosen:
                injection.switch(chosen)
    return model


def delete_adapter(model: ModuleT, adapter_name: str) -> ModuleT:
    """Take one adapter out of a model and leave the others. The last one leaves the model as it was.

    Raises:
        ValueError: If there is none of this name, or the adapters are merged. Nothing is changed then.
    """
    layers, found = _parts(model)
    require_whole(model)
    _checked(adapter_name, found)
    _require_unmerged(model, layers)
    for injection in found:
        if injection.adapter_name == adapter_name:
            remove_adapter(injection)
    return model


@contextmanager
def disabled(model: ModuleT) -> Iterator[ModuleT]:
    """The base model alone, as long as the context lasts: no second copy of it is needed as a reference.

    Raises:
        ValueError: If there is no adapter, or the adapters are merged.
    """
    if not _parts(model)[1] and not is_removed(model):
        raise ValueError(f"There is no adapter to switch off in this {type(model).__name__}: inject or load one first.")
    with _activated(model, []):
        yield model


@contextmanager
def adapters_for(model: ModuleT, adapter_names: Sequence[str | None]) -> Iterator[ModuleT]:
    """Give each sample of a batch its own adapter, as long as the context lasts.

    The base runs once for all samples, and each adapter once for all of its own.

    Example::

        with adapters_for(model, ["fr", "de", None, "fr"]):
            logits = model(input_ids).logits  # four rows

    Args:
        model: A model with these adapters, unmerged.
        adapter_names: A name for each sample, ``None`` for the base alone. Layers may see several rows for each sample,
            all those of the first sample first.

    Raises:
        ValueError: If a name is unknown, the adapters are merged, one has modules trained in full, which cannot
            differ by sample, or processes share the model.
    """
    layers, found = _parts(model)
    names = _checked(sorted({name for name in adapter_names if name is not None}), found)
    _require_unmerged(model, layers)
    for injection in found:
        if injection.adapter_name in names and injection.trained:
            raise ValueError(
                f"The adapter {injection.adapter_name!r} has parameters trained in full (modules_to_save, bias), and "
                "a batch cannot have several of these: run its samples by themselves, with set_adapter."
            )
    if is_sharded(model):
        raise ValueError(
            "adapters_for needs the whole model in every process, since each may have other samples: use set_adapter, "
            "or run it on one device."
        )
    known = dict.fromkeys([injection.adapter_name for injection in found])
    rows = rows_of(adapter_names, [name for name in known if name in names])
    with _activated(model, []):
        for layer in layers:
            layer.chosen = (), rows
        try:
            yield model
        finally:
            for layer in layers:
                layer.chosen = (), None


@contextmanager
def _activated(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    layers, found = _parts(model)
    active = {layer: layer.active for layer in layers}
    in_place = [injection for injection in found if injection.in_place]
    set_adapter(model, adapter_names)
    try:
        yield
    finally:
        for layer, names in active.items():
            layer.active = names
        for injection in in_place:
            injection.switch(True)


def _parts(model: nn.Module) -> tuple[list[LoraLayer], list[Injection]]:
    """The adapted layers of a model, and its injections."""
    return adapted_layers(model), own_injections(model)


def _checked(adapter_names: str | Sequence[str] | None, found: list[Injection]) -> list[str]:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or [])
    known = dict.fromkeys([injection.adapter_name for injection in found])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"The model has no adapter {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}: inject, add or "
            "load it first. Nothing was changed."
        )
    return names


def _require_unmerged(model: nn.Module, layers: list[LoraLayer]) -> None:
    if is_removed(model) or any(layer.merged for layer in layers):
        raise ValueError(
            "The adapters are merged into the weights, so there is nothing to choose from: unmerge first. Nothing was "
            "changed."
        )


def _require_compatible(chosen: list[Injection]) -> None:
    """Two adapters cannot both train a parameter in full, nor share a layer if one of them sets its whole weight."""
    for one, other in combinations(chosen, 2):
        shared = set(one.trained) & set(other.trained)
        for name in set(one.targets) & set(other.targets):
            layer = dict(one.layers())[name]
            if any(part.sets_whole_weight for each in (one, other) for part in layer.parts(each.adapter_name)):
                shared.add(name)
        if one.root is other.root and shared:
            raise ValueError(
                f"{one.adapter_name!r} and {other.adapter_name!r} cannot be active together, since both set "
                f"{min(shared)} as a whole: choose one of them. Nothing was changed."
            )
