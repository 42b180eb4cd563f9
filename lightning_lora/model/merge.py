"""Merge adapters into the weights, and bring the base weights back bit for bit."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from lightning_lora.fqn import base_modules, clean_fqn
from lightning_lora.layers import LoraLayer, LoraQuantizedLinear, MergedForm, Packed, storage_of
from lightning_lora.layers.quantized.storage import PLAIN
from lightning_lora.model.multi_adapter import set_adapter
from lightning_lora.model.record import adapted_layers, injections, roots_of
from lightning_lora.model.removed import is_removed, let_go_if_changed, require_adapters, require_whole, restore
from lightning_lora.sharding import is_sharded

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_KEPT = 0.9  # of an update, below which it has not survived quantization


def merge(
    model: ModuleT,
    adapter_names: str | Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> ModuleT:
    """Merge the adapters into the weights, in place: ``W = W0 + scaling * B A``, so that inference costs nothing extra.

    The adapters stay in their layers, inactive, and the base weights stay in memory for :func:`unmerge`. To get a model
    with no trace of LoRA in it, use ``eject(model, merge=True)``. Merging twice changes nothing.

    Args:
        model: A model with adapters.
        adapter_names: Which to merge, one or several; they are active from now on. ``None`` is those that are.
        dtype: Of the ordinary weights that quantized ones become, rounded once: an adapter is merged into the
            dequantized values. ``None`` is the type before they were quantized. Other weights keep theirs.
        requantize: Quantize them again instead. How much of the update is left is measured in each layer, and a warning
            says if it is less than nine tenths in one; in 4 bits, little is.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no adapter, a name is unknown, or a merged weight holds a NaN or an infinity. Nothing is
            changed then.
    """
    if is_removed(model) and not injections(model):
        return model
    require_adapters(model, "to merge")
    if adapter_names is not None:
        set_adapter(model, adapter_names)
    merge_layers(model, adapted_layers(model), MergedForm(dtype, requantize))
    return model


def unmerge(model: ModuleT) -> ModuleT:
    """Bring the base weights back, bit for bit, and the adapters to work, after :func:`merge` or ``eject(merge=True)``.

    Where merged weights were changed since, by training or loading, the adapters are let go and the weights stay.

    Args:
        model: A merged model; one that is not merged is left as it is.

    Returns:
        The same model.

    Raises:
        ValueError: If only a part of what was merged together is in this model. Nothing is changed then.
    """
    require_whole(model, if_merged=True)
    restore(model)
    for root in roots_of(injections(model)):
        let_go_if_changed(root)
    for layer in adapted_layers(model):
        if layer.merged:
            layer.unmerge()
    return model


@torch.inference_mode(False)  # in which weights would become ones that can never be trained again
@torch.no_grad()
def merge_layers(model: nn.Module, layers: list[LoraLayer], form: MergedForm) -> None:
    """Merge the layers that are not merged yet, all of them or, after an error, none."""
    layers = [layer for layer in layers if not layer.merged]
    quantized = [layer for layer in layers if isinstance(layer, LoraQuantizedLinear)]
    if quantized and is_sharded(model):
        raise ValueError(
            "Processes share the quantized weights, whose merged values have no place there: use save_merged, which "
            "writes them layer by layer, or merge the adapter on one device. Nothing was changed."
        )
    form = dataclasses.replace(form, otherwise=surrounding_dtype(model))
    _require_own_weights(model, [layer for layer in layers if layer not in quantized])
    leaders = {id(layer.lora): layer for layer in reversed(layers)}  # layers that share adapters share their weights
    elsewhere = _tied_elsewhere(model, layers)
    if is_sharded(model) and elsewhere:
        raise ValueError(
            f"{next(iter(elsewhere.values()))!r} is tied to an adapted weight, and where processes share the "
            "parameters, merging would change it too. Use merge=None, and merge the adapter on one device: "
            "load_adapter, then eject(model, merge=True). Nothing was changed."
        )
    merged = {key: layer.merged_as(form) for key, layer in leaders.items()}
    if quantized and form.requantize:
        _tell_what_is_kept(model, {id(layer): merged[id(layer.lora)] for layer in quantized})
    for key, layer in leaders.items():
        own = layer.adapted_parameters()
        # What is tied to a layer without this adapter gets a parameter of its own, for that layer stays as it is.
        layer.merge({name: _for(own.get(name), values, elsewhere) for name, values in merged[key].items()})
    for layer in layers:
        if layer is not leaders[id(layer.lora)]:
            layer.merge_like(leaders[id(layer.lora)])


def surrounding_dtype(model: nn.Module) -> torch.dtype:
    """The type of most of a model's numbers outside of quantized weights and adapters."""
    counts: Counter[torch.dtype] = Counter({torch.float32: 0})
    for _, module in base_modules(model):
        storage = storage_of(module)
        packed = () if storage is None else (*storage.parts, PLAIN)
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in packed and parameter.is_floating_point():
                counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _tell_what_is_kept(model: nn.Module, packed: Mapping[int, Packed]) -> None:
    """Say how much of the update is left in weights that were quantized again, given by the identity of layers."""
    layers = ((name, layer) for name, layer in base_modules(model) if isinstance(layer, LoraQuantizedLinear))
    kept = {clean_fqn(name): layer.kept(packed[id(layer)]) for name, layer in layers if id(layer) in packed}
    least = min(kept, key=lambda name: kept[name])
    text = (
        f"Quantized again, the {len(kept)} merged weights hold {statistics.median(kept.values()):.2f} of the adapter's "
        f"update (the median), and {kept[least]:.2f} at least, in {least!r}."
    )
    if kept[least] < _KEPT:
        rank_zero_warn(
            f"{text} What is lost is that of the training: merge without requantize, or keep the adapter unmerged."
        )
    else:
        rank_zero_info(text)


def _require_own_weights(model: nn.Module, layers: list[LoraLayer]) -> None:
    """Have layers compute with weights of their own, where pruning or a norm of weights makes them of others.

    Such may have been put on since the adapters were put in. What is merged would be computed anew in the next forward
    pass, and so be lost.

    Raises:
        ValueError: If it cannot be taken off.
    """
    inside = set(map(id, layers))
    for layer_name, layer in base_modules(model):
        for name in layer.adapted_parameters() if isinstance(layer, LoraLayer) and id(layer) in inside else ():
            owner_name, _, attribute = name.rpartition(".")
            owner = layer.get_submodule(owner_name)
            if attribute in owner._parameters:
                continue
            full_name = clean_fqn(f"{layer_name}.{name}".lstrip("."))
            _take_off(owner, attribute)
            if attribute not in owner._parameters:
                raise ValueError(
                    f"{full_name!r} is no parameter any more but computed of others, so nothing can be merged into it: "
                    "take off what computes it, or use merge=None."
                )
            rank_zero_warn(
                f"{full_name!r} was computed of others (pruning, a parametrization, or a norm of weights), which was "
                "put on since the adapter was put in. To merge the adapter, it was taken off and the weight kept."
            )


def _take_off(owner: nn.Module, attribute: str) -> None:
    """Make a weight that is computed of others a parameter again, and frozen, which some of torch's ways leave out."""
    if parametrize.is_parametrized(owner, attribute):
        parametrize.remove_parametrizations(owner, attribute)
    for remove in (prune.remove, remove_spectral_norm, remove_weight_norm):
        try:
            remove(owner, attribute)
        except ValueError:  # none of this kind is there
            continue
    left = owner._buffers.pop(attribute, None)
    if left is not None:  # as torch leaves a weight that was made of several
        owner.register_parameter(attribute, nn.Parameter(left.detach()))
    if (weight := owner._parameters.get(attribute)) is not None:
        weight.requires_grad_(False)


def _for(parameter: nn.Parameter | None, values: Any, elsewhere: dict[int, str]) -> Any:
    return nn.Parameter(values, requires_grad=False) if id(parameter) in elsewhere else values


def _tied_elsewhere(model: nn.Module, layers: list[LoraLayer]) -> dict[int, str]:
    """By identity, the adapted parameters that another module has too, and its name."""
    adapted = {id(parameter): layer for layer in layers for parameter in layer.adapted_parameters().values()}
    inside = {id(inner): id(layer.lora) for layer in layers for _, inner in base_modules(layer)}
    return {
        id(parameter): clean_fqn(name)
        for name, module in base_modules(model)
        for parameter in module._parameters.values()
        if id(parameter) in adapted and inside.get(id(module)) != id(adapted[id(parameter)].lora)
    }
