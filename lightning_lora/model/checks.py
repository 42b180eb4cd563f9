"""What must hold before an adapter is put in; nothing here changes a model."""

from collections.abc import Iterable, Iterator

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import base_modules, clean_fqn, is_submodule, listed
from lightning_lora.layers import Adapter, LoraLayer, LoraParameters, Target, adapter_class_for
from lightning_lora.layers.own_forward import has_own_forward
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.model.record import (
    Injection,
    adapted_layers,
    base_parameters,
    injections,
    injections_of,
    parameters_by_name,
)
from lightning_lora.model.targets import TargetError, find_modules_to_save, find_targets, modules_by_name


def require_name(adapter_name: str) -> None:
    """Require a name under which an adapter can be put into a layer."""
    container = nn.ModuleDict()
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name or hasattr(container, adapter_name):
        raise TargetError(
            f"adapter_name is {adapter_name!r}, but it must be a name without dots, other than those of "
            'nn.ModuleDict\'s own methods: "default" is a common choice. Nothing was changed.'
        )


def require_unwrapped(model: nn.Module) -> None:
    """Require a model that PEFT has put no adapter into, which this one would adapt and freeze."""
    for name, module in base_modules(model):
        # By name, so that PEFT need not be imported.
        if type(module).__module__.startswith(("peft.peft_model", "peft.tuners", "peft.mixed_model")):
            raise TargetError(
                f"{repr(clean_fqn(name)) if name else 'The model'} is a {type(module).__name__} of PEFT: its adapter "
                "would be adapted in turn, and frozen. Give LoRA() no settings of an adapter, so that it takes PEFT's "
                "for its own; or give the model without get_peft_model, whose place this package takes (LoRA(r=..., "
                "target_modules=...), and load_adapter(model, directory) for what PEFT has saved); or call "
                "merge_and_unload() first to train on top of it. Nothing was changed."
            )


def require_room(targets: dict[str, Target], config: LoraConfig, adapter_name: str, present: list[Injection]) -> None:
    """Require that the adapter can go beside those that are there."""
    layers = {name: target.module for name, target in targets.items() if isinstance(target.module, LoraLayer)}
    taken = [name for name, layer in layers.items() if adapter_name in layer.lora]
    shown = f"{', '.join(taken[:3])}{' and others' if len(taken) > 3 else ''}"
    if taken:
        there = "; ".join(f"{injection.adapter_name!r} with {injection.config}" for injection in present)
        raise TargetError(
            f"{shown} already carry an adapter"
            + (f" ({there})" if there else "")
            + f", and a second one named {adapter_name!r} cannot be put over it: eject the first, use the same "
            "settings, or give each adapter a name or layers of its own. Nothing was changed."
        )
    new = {name: adapter_class_for(targets[name].layer_class, config) for name in layers}
    # Where there are several, they share the layer already.
    apart = [
        name
        for name, layer in layers.items()
        if not isinstance(layer, targets[name].layer_class)
        or not all(
            adapter.shares_layer for adapter in (new[name], *_parts(layer, list(layer.lora)[:1])) if adapter is not None
        )
    ]
    if apart:
        raise TargetError(
            f"{apart[0]} has an adapter of a kind that cannot share a layer with the new one, as token rows "
            "(trainable_token_indices) and LoRA cannot: give each adapter layers of its own. Nothing was changed."
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise TargetError(
            f"{merged[0]} is merged, so no adapter can be put into it: unmerge first. Nothing was changed."
        )
    whole = [
        name
        for name, layer in layers.items()
        if layer.active and any(a.sets_whole_weight for a in (new[name], *_parts(layer, layer.active)) if a is not None)
    ]
    if whole:
        raise TargetError(
            f"DoRA, or another kind of adapter here, sets the whole weight of {whole[0]}, or rows of it, so no other "
            "can be active with it: use add_adapter, which leaves the choice to set_adapter. Nothing was changed."
        )
    loners = [injection.adapter_name for injection in present if injection.config.takes_from_base]
    if layers and (loners or config.takes_from_base):
        raise TargetError(
            f"The adapter {loners[0] if loners else adapter_name!r} starts at a part of the base's weights "
            f"(init_lora_weights), so it cannot share {next(iter(layers))} with another, whose base would be changed: "
            "give each adapter layers of its own. Nothing was changed."
        )


def _parts(layer: LoraLayer, names: Iterable[str] | None = None) -> Iterator[Adapter]:
    for name in layer.lora if names is None else names:
        yield from layer.parts(name)


def require_initialized(model: nn.Module) -> None:
    """Require that all parameters and buffers are there."""
    for module_name, module in base_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if not isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                continue
            full_name = clean_fqn(f"{module_name}.{name}".lstrip("."))
            raise TargetError(
                f"{full_name!r} belongs to a lazy layer and has no values yet: run a batch through the model "
                "first, in configure_model at the latest. Nothing was changed."
            )


def require_clear_freeze(model: nn.Module, config: LoraConfig) -> None:
    """Require that training would not train what was frozen beside what was to train, such as a teacher.

    Raises:
        TargetError: If it would.
    """
    known = {id(each): each for each in (*injections_of(model), *injections(model))}.values()
    if adapted_layers(model) and not known:
        return  # adapters of a larger module, which has frozen this one
    frozen_here = {id(p) for each in known for p in _parameters_of(each.root, each.frozen)}
    trains = {clean_fqn(name): p.requires_grad or id(p) in frozen_here for name, p in base_parameters(model)}
    # Quantized weights never require gradients, which so says nothing of them.
    packed = {name: storage.parts for name, _, storage, _ in quantized_layers(model)}
    parts = {f"{name}.{part}".lstrip(".") for name, inside in packed.items() for part in inside}
    trains = {name: train for name, train in trains.items() if name not in parts}
    if len(set(trains.values())) < 2:
        return  # nothing was frozen, or all of it
    targets, saved = find_targets(model, config), find_modules_to_save(model, config)
    parameters = parameters_by_name(model)
    training, standing = ({id(parameters[name]) for name in trains if trains[name] is each} for each in (True, False))
    own = {name: set(map(id, target.module.parameters())) for name, target in targets.items()}
    frozen = [name for name, inside in own.items() if inside & standing and not inside & training]
    beside = [name for name in targets if name not in frozen and name not in packed]
    if isinstance(config.target_modules, list):
        frozen = [name for name in frozen if name not in config.target_modules]  # which are meant
    if config.layer_groups:
        beside += [name for name, train in trains.items() if train and not any(is_submodule(name, s) for s in saved)]
    if frozen and beside:
        whole = _outermost_frozen(model, trains, frozen)
        raise TargetError(
            f"The targets match {listed(list(map(repr, frozen)))}, which were frozen (requires_grad_(False)), beside "
            f"{beside[0]!r}, which trains. If they are to stay as they are, as a teacher is, leave them out: "
            f"exclude_modules={[f'{name}.*' for name in whole] or frozen}. If they are a backbone to adapt, let their "
            "parameters require gradients before, since LoRA freezes the weights itself; or name what trains beside "
            "them in modules_to_save. Nothing was changed."
        )


def _parameters_of(root: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    parameters = parameters_by_name(root)
    return [parameters[name] for name in names if name in parameters]


def _outermost_frozen(model: nn.Module, trains: dict[str, bool], names: Iterable[str]) -> list[str]:
    """The outermost modules around these of which nothing trains."""
    found: list[str] = []
    for name in modules_by_name(model):
        inside = [train for full_name, train in trains.items() if is_submodule(full_name, name)]
        around = any(is_submodule(each, name) and each != name for each in names)
        if name and around and not any(inside) and not any(is_submodule(name, outer) for outer in found):
            found.append(name)
    return found


def warn_of_own_forwards(targets: dict[str, Target]) -> None:
    """Say so of layers whose objects were given forwards, of which it cannot be known what they make of the weight."""
    own = [
        name
        for name, target in targets.items()
        if has_own_forward(target.module) and not issubclass(target.layer_class, LoraParameters)
    ]
    if own:
        rank_zero_warn(
            f"{listed(list(map(repr, own)))} were given a forward of their own (layer.forward = ...). The adapter is "
            "added to what it gives, and what is merged is equal to that only if it computes what the layer's class "
            "does. If it does not, make it the forward of a subclass, or adapt the weight where it is read, by "
            f'target_parameters=["{own[0]}.weight"].'
        )


def warn_of_ties(model: nn.Module, targets: dict[str, Target]) -> None:
    holders: dict[int, list[str]] = {}
    for module_name, module in base_modules(model):
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append(clean_fqn(f"{module_name}.{name}".lstrip(".")))
    for name, target in targets.items():
        adapted = {f"{name}.{parameter}".lstrip(".") for parameter in target.parameters}
        others = [
            other
            for parameter in target.parameters
            for other in holders[id(target.module.get_parameter(parameter))]
            if other not in adapted
        ]
        if others:
            rank_zero_warn(
                f"The weight of {name!r} is tied to {', '.join(map(repr, others))}. The adapter changes {name!r} "
                "alone; merging it gives the layer a weight of its own, so the merged model is no longer tied."
            )
