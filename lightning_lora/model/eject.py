"""Take adapters out of a model, folded into the weights or not, and put them back."""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lightning_lora.fqn import clean_fqn
from lightning_lora.layers import (
    LoraLayer,
    class_without_adapter,
)
from lightning_lora.model.freeze import freeze_norms, leave_fused_path, thaw
from lightning_lora.model.inject import put_parameters
from lightning_lora.model.record import ATTRIBUTE, Injection, adapted_layers, base_parameters, injections, injections_of
from lightning_lora.model.targets import modules_by_name
from lightning_lora.sharding import is_sharded, reshard

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def merged_weights(model: nn.Module, layers: list[LoraLayer]) -> dict[int, dict[str, nn.Parameter]]:
    """The merged parameters of some layers of a model, by the identity of their adapters.

    Layers that share their adapters share their weights, so they get the same merged ones and stay tied.

    Raises:
        ValueError: If a merged parameter holds a NaN or an infinity, or would change another layer with this one.
    """
    if is_sharded(model):
        _require_untied(model, layers)
    return {key: layer.merged_weights() for key, layer in {id(layer.lora): layer for layer in layers}.items()}


def _require_untied(model: nn.Module, layers: list[LoraLayer]) -> None:
    """Require that no other module shows the adapted parameters, which are merged in place where they are sharded."""
    adapted = {id(parameter): layer for layer in layers for parameter in layer.adapted_parameters().values()}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            layer = adapted.get(id(parameter))
            if layer is not None and all(module is not inner for inner in layer.modules()):
                raise ValueError(
                    f"{clean_fqn(name)!r} is tied to an adapted weight, and where processes share the parameters, "
                    "merging would change it too. Use merge=None, and merge the adapter on one device: load_adapter, "
                    "then eject(model, merge=True). Nothing was changed."
                )


@dataclasses.dataclass
class _Folded:
    """Injections that were taken out with their adapters folded in: all it takes to put them back."""

    injections: list[Injection]
    classes: dict[str, type[nn.Module]] = dataclasses.field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    adapters: dict[str, nn.ModuleDict] = dataclasses.field(default_factory=dict)


# The base weights of a folded model live here, so that nothing of the plugin is left on the model itself.
_folded: "weakref.WeakKeyDictionary[nn.Module, _Folded]" = weakref.WeakKeyDictionary()


def eject(model: ModuleT, merge: bool = False) -> ModuleT:
    """Take the adapters out of a model, in place: class and attributes of every layer are again as they were.

    Args:
        model: The model, or one that contains it.
        merge: Fold the adapters into the weights, and keep the weights trained in full. :func:`unmerge` then restores
            the adapted model, whose base weights are kept in memory until the model is gone. By default, the base
            weights are restored and the adapters dropped.

    Returns:
        The same model.

    Raises:
        ValueError: If a merged weight holds a NaN or an infinity, or if there is no adapter in the model. Nothing is
            changed then.
    """
    found = list(injections(model))
    if not found:
        raise ValueError(f"There is no adapter in this {type(model).__name__}: inject one first, or leave out eject.")
    reshard(model)
    layers = [layer for _, root, injection in found for _, layer in adapted_layers(root, injection)]
    merged = merged_weights(model, [layer for layer in layers if merge and not layer.merged])
    for root in {id(root): root for _, root, _ in found}.values():
        folded = _Folded(injections_of(root))
        named = {name: layer for injection in folded.injections for name, layer in adapted_layers(root, injection)}
        for name, layer in named.items():
            if id(layer.lora) in merged:
                layer.merge(merged[id(layer.lora)])
            elif not merge:
                layer.unmerge()
            folded.classes[name], folded.adapters[name] = type(layer), layer.lora
            folded.attributes[name] = _take_off(layer)
        for injection in reversed(folded.injections):
            if not merge:
                put_parameters(root, {**injection.originals, **injection.whole})
            thaw(root, injection)
        root.__dict__.pop(ATTRIBUTE, None)
        if merge:
            _folded[root] = folded
    return model


def _take_off(layer: LoraLayer) -> dict[str, Any]:
    """Give a layer its old class back.

    Returns:
        The attributes that it had beside its adapters.
    """
    attributes = {name: layer.__dict__.pop(name) for name in ("_base_weights", "_active", "_rows")}
    del layer.lora
    layer.__class__ = class_without_adapter(layer)  # type: ignore[assignment]
    return attributes


def remove_adapter(root: nn.Module, injection: Injection) -> None:
    """Take one adapter out, and leave the others."""
    for _, layer in adapted_layers(root, injection):
        if injection.adapter_name in layer.lora:  # else it is tied to one before, whose adapters it shares
            del layer.lora[injection.adapter_name]
        if injection.adapter_name in layer._active:
            layer._active.remove(injection.adapter_name)
        if not layer.lora:
            _take_off(layer)
    if injection.in_place:
        put_parameters(root, {**injection.originals, **injection.whole})
    others = injections_of(root)
    others.remove(injection)
    if others:  # what was thawed with the last one is thawed with the last one still
        others[0].frozen = [*others[0].frozen, *injection.frozen]
        others[0].frozen_norms += injection.frozen_norms
        others[0].fused = {**others[0].fused, **injection.fused}
    else:
        thaw(root, injection)
        root.__dict__.pop(ATTRIBUTE, None)


def is_folded(model: nn.Module) -> bool:
    """Whether adapters were folded into this model and taken out of sight."""
    return bool(_folded) and any(module in _folded for module in model.modules())


def restore_folded(model: nn.Module) -> None:
    """Undo ``eject(model, merge=True)``: the base weights back bit for bit, the adapters in their layers."""
    reshard(model)
    for root in [module for module in model.modules() if module in _folded]:
        modules, folded = modules_by_name(root), _folded.pop(root)
        for name, layer_class in folded.classes.items():
            layer = modules[name]
            layer.__class__ = layer_class
            assert isinstance(layer, LoraLayer)
            layer.__dict__.update(folded.attributes[name])
            layer.lora = folded.adapters[name]
            if not is_sharded(layer.lora):
                layer.lora.to(next(iter(layer.adapted_parameters().values())).device)
            layer.unmerge()
        root.__dict__[ATTRIBUTE] = folded.injections
        for injection in folded.injections:
            freeze_norms(root, injection)
            leave_fused_path(root, injection)
        for _, parameter in base_parameters(root):
            parameter.requires_grad_(False)
        for injection in injections_of(root):
            for parameter in injection.trained.values():
                parameter.requires_grad_(True)


@contextmanager
def unmerged_for_saving(model: nn.Module) -> Iterator[None]:
    """Bring the adapters that ``eject(merge=True)`` folded in to light meanwhile; does nothing to other models."""
    folded = is_folded(model)
    if folded:
        restore_folded(model)
    try:
        yield
    finally:
        if folded:
            eject(model, merge=True)
