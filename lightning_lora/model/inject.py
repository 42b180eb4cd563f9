"""Put adapters into a model: check, build, freeze the base, and give the layers their new classes.

Everything that is done is noted in an :class:`~lightning_lora.model.record.Injection`, so that it can be undone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers import Adapter, LoraLayer, Target, adapted_class, change_class, new_adapter
from lightning_lora.layers.offloading import offloading_hook
from lightning_lora.model.checks import (
    require_initialized,
    require_name,
    require_room,
    require_unwrapped,
    warn_of_own_forwards,
    warn_of_ties,
)
from lightning_lora.model.copies import start_copies_alike
from lightning_lora.model.freeze import freeze
from lightning_lora.model.quantization import quantization, require_unquantized
from lightning_lora.model.read_watch import watch_reads
from lightning_lora.model.record import (
    Injection,
    adopt,
    base_parameters,
    injections_of,
    keep_record,
    parameters_by_name,
)
from lightning_lora.model.shard_adapters import require_shardable, shard_adapters
from lightning_lora.model.targets import TargetError, find_modules_to_save, find_targets, modules_by_name, parameters_in
from lightning_lora.model.token_targets import find_token_targets
from lightning_lora.sharding import named_tensors

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def inject(model: ModuleT, config: LoraConfig, adapter_name: str = "default") -> ModuleT:
    """Freeze a model and put LoRA adapters into it, in place.

    The fresh adapter changes nothing: the outputs equal the base model's, bit for bit. Injecting the same config again
    does nothing. Under another name, a further adapter goes beside those that are there, and is active with them; see
    :func:`~lightning_lora.set_adapter`.

    Args:
        model: Any module. Its parameters keep their names; each adapted layer gains ``lora.<adapter_name>``.
        config: What to adapt and how.
        adapter_name: Name of the adapter; a name of a Python attribute, so without dots.

    Returns:
        The same model.

    Raises:
        TargetError: If the config does not fit the model, or another adapter is in the way. Nothing is changed then.
    """
    require_name(adapter_name)
    require_unwrapped(model)
    adopt(model)
    present = injections_of(model)
    same_name = [found for found in present if found.adapter_name == adapter_name]
    if any(found.config == config and not found.is_part for found in same_name):
        return model
    require_initialized(model)
    _put_in(_plan(model, config, adapter_name, present))
    return model


@dataclass(frozen=True)
class _Plan:
    """What is to be put in: checked and built, with nothing changed yet.

    Attributes:
        injection: The record of it, without its layers.
        targets: The layers to adapt, by name.
        tokens: The embeddings with rows to train, by name.
        adapters: The new adapters, by the names of their layers.
        residuals: What the base's weights become where the adapter starts at them, by name.
        trained: The names of the parameters to train in full.
    """

    injection: Injection
    targets: dict[str, Target]
    tokens: dict[str, Target]
    adapters: dict[str, nn.Module]
    residuals: dict[str, Tensor]
    trained: list[str]


def _plan(model: nn.Module, config: LoraConfig, adapter_name: str, present: list[Injection]) -> _Plan:
    targets = find_targets(model, config)
    saved = find_modules_to_save(model, config)
    tokens = find_token_targets(model, config, targets, saved)
    every = {**targets, **tokens}
    require_room(every, config, adapter_name, present)
    require_shardable(model, config, every.values())
    warn_of_ties(model, targets)
    warn_of_own_forwards(targets)
    adapters = {
        name: new_adapter(target, config, adapter_name) for name, target in every.items() if target.tied_to is None
    }
    if not config.freeze_A:  # which is drawn again by a layer's name
        start_copies_alike(targets, adapters)
    _connect(adapters.values(), config)
    residuals = {}
    if config.takes_from_base:
        residuals = {
            f"{name}.{inner}".lstrip("."): residual
            for name, target in targets.items()
            for inner, residual in target.layer_class.start_at_weight(target.module, adapters[name]).items()
        }
    injection = Injection(model, config, adapter_name, saved)
    injection.quantization = quantization(model)
    trained = _names_to_train(model, targets, saved, config.bias)
    _require_loaded(model, trained)
    require_unquantized(model, saved)
    return _Plan(injection, targets, tokens, adapters, residuals, trained)


def _put_in(plan: _Plan) -> None:
    injection, adapter_name = plan.injection, plan.injection.adapter_name
    every = {**plan.targets, **plan.tokens}
    for name, target in every.items():
        layer = _adapted(target)
        layer.active = (*layer.active, adapter_name)
        if target.tied_to is None:
            layer.lora[adapter_name] = plan.adapters[name]
    adapted = [target.module for target in plan.targets.values()]
    shard_adapters(injection.root, adapted, adapter_name)  # type: ignore[arg-type]
    for target in plan.tokens.values():
        if target.tied_to is not None:
            target.module.lora = plan.tokens[target.tied_to].module.lora
    injection.add_layers({name: target.module for name, target in every.items()})  # type: ignore[misc]
    freeze(injection)
    injection.put_aside(plan.residuals)
    _train_in_full(injection, plan.trained)
    keep_record(injection)
    watch_reads(injection.root, plan.targets.values())


def _adapted(target: Target) -> LoraLayer:
    """The layer of a target, which takes on its new class unless it has it already."""
    layer: Any = target.module
    if not isinstance(layer, LoraLayer):
        change_class(layer, adapted_class(target.layer_class, type(layer)))  # type: ignore[arg-type]
        layer.begin()
    return layer  # type: ignore[no-any-return]


def _connect(adapters: Iterable[nn.Module], config: LoraConfig) -> None:
    """Give all adapters of each class what they share."""
    parts = [part for adapter in adapters for part in adapter.modules() if isinstance(part, Adapter)]
    for adapter_class in {type(part): None for part in parts}:
        adapter_class.connect([part for part in parts if type(part) is adapter_class], config)


def _names_to_train(
    model: nn.Module, targets: dict[str, Target], saved: dict[str, nn.Module | Tensor], bias: str
) -> list[str]:
    """The parameters to train in full, as far as no other injection does."""
    names = parameters_in(saved)
    if bias == "lora_only":
        names += [f"{name}.bias" for name, each in targets.items() if getattr(each.module, "bias", None) is not None]
    if not names and bias != "all":
        return []
    parameters = parameters_by_name(model)
    if bias == "all":
        names += [name for name in parameters if name.split(".")[-1] == "bias"]
    free = {id(parameter) for _, parameter in base_parameters(model)}
    wanted = dict.fromkeys(name.lstrip(".") for name in names)
    return [name for name in wanted if id(parameters[name]) in free]


def _require_loaded(model: nn.Module, names: Iterable[str]) -> None:
    wanted = set(names)
    if not wanted:
        return
    named = ((name, module) for name, module, _ in named_tensors(model, of_base=True) if name in wanted)
    elsewhere = [name for name, module in named if offloading_hook(module) is not None]
    if elsewhere:
        raise TargetError(
            f"{elsewhere[0]} would be trained in full (modules_to_save, bias), but accelerate keeps it elsewhere: "
            "inject before accelerate's dispatch. Nothing was changed."
        )


def _train_in_full(injection: Injection, names: list[str]) -> None:
    """Train the parameters of these names and keep the base's values, and those of their modules' buffers."""
    injection.trained = names
    if not names and not injection.saved:
        return
    parameters = parameters_by_name(injection.root)
    tied = _tied_elsewhere(injection.root, names)
    untied = {name: tied[id(parameters[name])] for name in names if id(parameters[name]) in tied}
    if untied:
        rank_zero_warn(
            f"{'; '.join(f'{name!r} is tied to {other!r}' for name, other in untied.items())}. The one is trained in "
            "full and the other stays as it is, so while the adapter is in the model, and once it is merged, they are "
            "no longer tied. Name both in modules_to_save to train them as one."
        )
    copies: dict[int, Tensor] = {}
    for key, parameter in {id(parameters[name]): parameters[name] for name in names}.items():
        copy = parameter.detach().clone()
        # What is tied to other parts of the base gets a parameter of its own, since they stay as they are.
        copies[key] = nn.Parameter(copy) if key in tied else copy
    buffers = {
        f"{name}.{inner}".lstrip("."): buffer
        for name, module in modules_by_name(injection.root).items()
        for inner, buffer in module._buffers.items()
        if buffer is not None
    }
    injection.put_aside(
        {name: copies[id(parameters[name])] for name in names}
        | {name: buffer.detach().clone() for name, buffer in buffers.items() if injection.saves(name)}
    )
    for tensor in injection.tensors(names).values():
        tensor.requires_grad_(True)


def _tied_elsewhere(root: nn.Module, names: list[str]) -> dict[int, str]:
    """By identity, the parameters of these names that other modules have too, and their name there."""
    parameters = parameters_by_name(root)
    holders: dict[int, dict[tuple[int, str], str]] = {}  # a module may have several names itself
    wanted: set[tuple[int, str]] = set()
    chosen = set(names)
    for name, module, inner in named_tensors(root, of_base=True):
        holders.setdefault(id(getattr(module, inner)), {}).setdefault((id(module), inner), name)
        if name in chosen:
            wanted.add((id(module), inner))
    return {
        key: min(others)
        for key in {id(parameters[name]) for name in names}
        if (others := [name for place, name in holders[key].items() if place not in wanted])
    }
