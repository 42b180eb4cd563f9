"""Put adapters into a model and take them out: swap layers' classes, freeze and thaw.

Everything that an injection did is noted in one :class:`Injection` on the module that it was made on, so that taking it
out restores the very objects that were there before.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any, Optional, TypeVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.config import LoraConfig
from lightning_lora.joining import join, require_joinable
from lightning_lora.layers import (
    LoraLayer,
    Target,
    TokenAdapter,
    adapted_class,
    class_without_adapter,
    share_projections,
)
from lightning_lora.names import clean_name, is_inside
from lightning_lora.sharding import exchange, is_part, is_sharded, put, settle
from lightning_lora.targets import (
    TargetError,
    find_modules_to_save,
    find_targets,
    modules_by_name,
)
from lightning_lora.token_targets import find_token_targets

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_ATTRIBUTE = "_lora_injections"
_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclasses.dataclass
class Injection:
    """What one injection did to a model.

    Attributes:
        config: The settings.
        adapter_name: Name of the adapter.
        targets: Names of the adapted layers.
        saved: Names of the modules that are trained in full.
        originals: By the name of each parameter that is trained in full, the base's own.
        trained: By the same names, the trained copies.
        in_place: Whether the trained copies, and the rests below, are in the model now, and not the base's own.
        whole: By name, the base's weights out of which an adapter's start was taken.
        rest: By the same names, what was left of them.
        frozen: Names of the base parameters that were trainable before.
        frozen_norms: Names of the normalization layers whose statistics are frozen.
        fused: By name, the switches of torch's fused encoder path that were on.
        fingerprint: Of the base, once it is known.
        from_data: Whether the adapter's start was computed from data.
    """

    config: LoraConfig
    adapter_name: str
    targets: list[str] = dataclasses.field(default_factory=list)
    saved: list[str] = dataclasses.field(default_factory=list)
    originals: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    trained: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    in_place: bool = True
    whole: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    rest: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    frozen: list[str] = dataclasses.field(default_factory=list)
    frozen_norms: list[str] = dataclasses.field(default_factory=list)
    fused: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: Optional[str] = None
    from_data: bool = False


class FrozenNorm(nn.Module):
    """A normalization layer of the base with running statistics: it uses them, and no training step moves them.

    Whatever mode is asked for, the layer works as in evaluation. The mode asked for is what it has when it is thawed.
    """

    @property
    def training(self) -> bool:  # type: ignore[override]
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return (_new_frozen_norm, (type(self).__bases__[1],), *state)


@cache
def _frozen_norm_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{base.__name__}", (FrozenNorm, base), {"__module__": __name__})


def _new_frozen_norm(base: type[nn.Module]) -> nn.Module:
    cls = _frozen_norm_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def inject(model: ModuleT, config: LoraConfig, adapter_name: str = "default") -> ModuleT:
    """Freeze a model and put LoRA adapters into it, in place.

    The fresh adapter changes nothing: the outputs equal the base model's, bit for bit. Injecting the same config again
    does nothing. Under another name, a further adapter goes beside those that are there, and is at work with them; see
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
    present = injections_of(model)
    if any((injection.config, injection.adapter_name) == (config, adapter_name) for injection in present):
        return model
    targets = find_targets(model, config)
    saved = find_modules_to_save(model, config)
    modules = {name: target.module for name, target in targets.items()}
    tokens = find_token_targets(model, config, targets, saved)
    every = {**targets, **tokens}
    _require_room(every, config, adapter_name, present)
    require_joinable(model, config, every.values())
    injection = Injection(config, adapter_name, targets=list(every), saved=list(saved))
    _warn_of_ties(model, targets)

    # Built before anything is changed, so that an error leaves the model as it was.
    adapters = {
        name: target.layer_class.new_adapter(target, config, adapter_name).train(target.module.training)
        for name, target in every.items()
        if target.tied_to is None
    }
    share_projections(adapters.values(), config)
    trained = _parameters_to_train(model, modules, saved, config.bias)
    rest = {}
    if config.takes_from_base:
        rest = {name: nn.Parameter(adapters[name].take_from(m.weight), False) for name, m in modules.items()}  # type: ignore

    injection.frozen = [clean_name(name) for name, parameter in base_parameters(model) if parameter.requires_grad]
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    for name, target in every.items():
        layer = _adapted(target)
        layer._active.append(adapter_name)
        if target.tied_to is None:
            layer.lora[adapter_name] = adapters[name]
    join(model, [target.module for target in targets.values()], adapter_name)  # type: ignore[misc]
    for target in tokens.values():
        if target.tied_to is not None:
            target.module.lora = tokens[target.tied_to].module.lora
    for name, weight in rest.items():
        full_name = f"{name}.weight".lstrip(".")
        injection.whole[full_name], injection.rest[full_name] = exchange(modules[name], "weight", weight), weight
    _train_in_full(model, trained, injection)
    _freeze_norms(model, injection)
    _leave_fused_path(model, injection)
    model.__dict__.setdefault(_ATTRIBUTE, []).append(injection)
    return model


def _adapted(target: Target) -> LoraLayer:
    """The layer of a target, which takes on its new class unless it has it already."""
    layer: Any = target.module
    if not isinstance(layer, LoraLayer):
        layer.__class__ = adapted_class(target.layer_class, type(layer))  # type: ignore[arg-type]
        layer.__dict__.update(_base_weights={}, _active=[], _rows=None)  # not in the module's own state dict
        layer.lora = nn.ModuleDict()
    return layer  # type: ignore[no-any-return]


def injections_of(model: nn.Module) -> list[Injection]:
    """What was injected with this very module as the root."""
    found: list[Injection] = model.__dict__.get(_ATTRIBUTE, [])
    return found


def injections(model: nn.Module) -> Iterator[tuple[str, nn.Module, Injection]]:
    """All injections in a model: the name of the module on which each was made, that module, and the record."""
    for name, module in model.named_modules():
        if _ATTRIBUTE in module.__dict__:
            yield from ((clean_name(name), module, injection) for injection in injections_of(module))


def adapted_layers(root: nn.Module, injection: Injection) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of one injection."""
    modules = modules_by_name(root)
    for name in injection.targets:
        layer = modules[name]
        assert isinstance(layer, LoraLayer)
        yield name, layer


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
                    f"{clean_name(name)!r} is tied to an adapted weight, and where processes share the parameters, "
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
    settle(model)
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
                _put_parameters(root, {**injection.originals, **injection.whole})
            _thaw(root, injection)
        root.__dict__.pop(_ATTRIBUTE, None)
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


def take_out(root: nn.Module, injection: Injection) -> None:
    """Take one adapter out, and leave the others."""
    for _, layer in adapted_layers(root, injection):
        if injection.adapter_name in layer.lora:  # else it is tied to one before, whose adapters it shares
            del layer.lora[injection.adapter_name]
        if injection.adapter_name in layer._active:
            layer._active.remove(injection.adapter_name)
        if not layer.lora:
            _take_off(layer)
    if injection.in_place:
        _put_parameters(root, {**injection.originals, **injection.whole})
    others = injections_of(root)
    others.remove(injection)
    if others:  # what was thawed with the last one is thawed with the last one still
        others[0].frozen = [*others[0].frozen, *injection.frozen]
        others[0].frozen_norms += injection.frozen_norms
        others[0].fused = {**others[0].fused, **injection.fused}
    else:
        _thaw(root, injection)
        root.__dict__.pop(_ATTRIBUTE, None)


def put_trained(root: nn.Module, injection: Injection, in_place: bool) -> None:
    """Put what an injection trains in full, or has left of the base, into the model; or the base's own back."""
    if in_place != injection.in_place:
        mine, of_base = {**injection.trained, **injection.rest}, {**injection.originals, **injection.whole}
        _put_parameters(root, mine if in_place else of_base)
        injection.in_place = in_place


def find_again(model: nn.Module) -> None:
    """Take note of the parameters that sharding or materializing has put in the place of those trained in full."""
    for _, root, injection in injections(model):
        if injection.in_place:
            parameters = _parameters_by_name(root)
            for mine in (injection.trained, injection.rest):
                mine.update({name: parameters[name] for name in mine})


def is_folded(model: nn.Module) -> bool:
    """Whether adapters were folded into this model and taken out of sight."""
    return bool(_folded) and any(module in _folded for module in model.modules())


def restore_folded(model: nn.Module) -> None:
    """Undo ``eject(model, merge=True)``: the base weights back bit for bit, the adapters in their layers."""
    settle(model)
    for root in [module for module in model.modules() if module in _folded]:
        modules, folded = modules_by_name(root), _folded.pop(root)
        for name, layer_class in folded.classes.items():
            layer = modules[name]
            layer.__class__ = layer_class  # type: ignore[assignment]
            assert isinstance(layer, LoraLayer)
            layer.__dict__.update(folded.attributes[name])
            layer.lora = folded.adapters[name]
            if not is_sharded(layer.lora):
                layer.lora.to(next(iter(layer.adapted_parameters().values())).device)
            layer.unmerge()
        root.__dict__[_ATTRIBUTE] = folded.injections
        for injection in folded.injections:
            _freeze_norms(root, injection)
            _leave_fused_path(root, injection)
        for _, parameter in base_parameters(root):
            parameter.requires_grad_(False)
        for injection in injections_of(root):
            for parameter in injection.trained.values():
                parameter.requires_grad_(True)


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that no injection trains, under each of their names."""
    trained = {id(p) for _, _, injection in injections(model) for p in injection.trained.values()}
    trained |= {id(p) for m in model.modules() if isinstance(m, LoraLayer) for p in m.lora.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [(name, parameter) for name, parameter in named if id(parameter) not in trained]


def _parameters_to_train(
    model: nn.Module, targets: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str
) -> dict[str, nn.Parameter]:
    names = [clean_name(f"{saved_name}.{name}") for saved_name, m in saved.items() for name, _ in m.named_parameters()]
    if bias == "lora_only":
        names += [f"{name}.bias" for name, module in targets.items() if getattr(module, "bias", None) is not None]
    parameters = _parameters_by_name(model)
    if bias == "all":
        names += [name for name in parameters if name.split(".")[-1] == "bias"]
    free = {id(parameter) for _, parameter in base_parameters(model)}  # another injection may train some already
    wanted = {name.lstrip("."): parameters[name.lstrip(".")] for name in names}
    return {name: parameter for name, parameter in wanted.items() if id(parameter) in free}


def _parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model under each of their clean names."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}


def _train_in_full(model: nn.Module, trained: dict[str, nn.Parameter], injection: Injection) -> None:
    """Train copies, so that the base's own parameters stay as they are."""
    copies = {id(parameter): nn.Parameter(parameter.detach().clone()) for parameter in trained.values()}
    injection.originals = trained
    injection.trained = {name: copies[id(parameter)] for name, parameter in trained.items()}
    if is_sharded(model):  # the strategy keeps the very objects, so the copies are what stays as it is
        injection.originals, injection.trained = injection.trained, injection.originals
    _put_parameters(model, injection.trained)
    for parameter in injection.trained.values():
        parameter.requires_grad_(True)


def _put_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        return
    modules = {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, parameter in parameters.items():
        module_name, _, attribute = name.rpartition(".")
        owner = modules[module_name]
        if is_part(owner, attribute):
            put(owner, attribute, parameter)
        else:
            parameter.data = parameter.data.to(getattr(owner, attribute).device)
            setattr(owner, attribute, parameter)


def _freeze_norms(model: nn.Module, injection: Injection) -> None:
    for name, module in modules_by_name(model).items():
        inside_saved = any(is_inside(name, saved) for saved in injection.saved)
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        if tracks and not inside_saved and not isinstance(module, FrozenNorm):
            injection.frozen_norms.append(name)
            module.__class__ = _frozen_norm_class(type(module))  # type: ignore[assignment,arg-type]


def _leave_fused_path(model: nn.Module, injection: Injection) -> None:
    """Have torch's transformer encoders call their layers in eval mode too, where they else read the weights alone."""
    for name, module in modules_by_name(model).items():
        if isinstance(module, _ENCODERS) and any(is_inside(target, name) for target in injection.targets):
            for switch in ("activation_relu_or_gelu", "use_nested_tensor"):
                if getattr(module, switch, False):
                    injection.fused[f"{name}.{switch}"] = getattr(module, switch)
                    setattr(module, switch, False)


def _thaw(model: nn.Module, injection: Injection) -> None:
    parameters = _parameters_by_name(model)
    for name in injection.frozen:
        parameters[name].requires_grad_(True)
    modules = modules_by_name(model)
    for name in injection.frozen_norms:
        norm = modules[name]
        norm.__class__ = type(norm).__bases__[1]  # type: ignore[assignment]
    injection.frozen_norms = []
    for name, value in injection.fused.items():
        owner, _, switch = name.rpartition(".")
        setattr(modules[owner], switch, value)
    injection.fused = {}


def _require_room(targets: dict[str, Target], config: LoraConfig, adapter_name: str, present: list[Injection]) -> None:
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
    tokens = [
        name for name, target in targets.items() if name in layers and (target.tokens or _has_tokens(layers[name]))
    ]
    if tokens:
        raise TargetError(
            f"Rows of {tokens[0]} are trained as a part of its weight (trainable_token_indices), and several adapters "
            "cannot share such a layer: give each adapter layers of its own. Nothing was changed."
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise TargetError(
            f"{merged[0]} is merged, so no adapter can be put into it: unmerge first. Nothing was changed."
        )
    at_work = [injection.config.use_dora for injection in present if injection.adapter_name in _active_in(layers)]
    if at_work and (config.use_dora or any(at_work)):
        raise TargetError(
            f"DoRA sets the magnitude of whole weights, so no other adapter can be at work in {next(iter(layers))} "
            "with it: use add_adapter, which leaves the choice to set_adapter. Nothing was changed."
        )
    loners = [injection.adapter_name for injection in present if injection.config.takes_from_base]
    if layers and (loners or config.takes_from_base):
        raise TargetError(
            f"The adapter {loners[0] if loners else adapter_name!r} starts at a part of the base's weights "
            f"(init_lora_weights), so it cannot share {next(iter(layers))} with another, whose base would be changed: "
            "give each adapter layers of its own. Nothing was changed."
        )


def _has_tokens(layer: LoraLayer) -> bool:
    return any(isinstance(adapter, TokenAdapter) for adapter in layer.lora.values())


def _active_in(layers: dict[str, LoraLayer]) -> set[str]:
    return {name for layer in layers.values() for name in layer._active}


def _warn_of_ties(model: nn.Module, targets: dict[str, Target]) -> None:
    holders: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append(clean_name(f"{module_name}.{name}".lstrip(".")))
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
