"""Put adapters into a model and take them out: swap layers' classes, freeze and thaw.

Everything that an injection did is noted in one :class:`Injection` on the module that it was made on, so that taking it
out restores the very objects that were there before.
"""

from typing import Any, TypeVar

from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import clean_fqn
from lightning_lora.layers import (
    LoraLayer,
    Target,
    adapted_class,
    share_projections,
)
from lightning_lora.model.checks import require_room, warn_of_ties
from lightning_lora.model.freeze import freeze_norms, leave_fused_path
from lightning_lora.model.record import (
    ATTRIBUTE,
    Injection,
    base_parameters,
    injections,
    injections_of,
    parameters_by_name,
)
from lightning_lora.model.shard_adapters import require_joinable, shard_adapters
from lightning_lora.model.targets import find_modules_to_save, find_targets
from lightning_lora.model.token_targets import find_token_targets
from lightning_lora.sharding import is_shard, is_sharded, load_full, swap_parameters

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
    require_room(every, config, adapter_name, present)
    require_joinable(model, config, every.values())
    injection = Injection(config, adapter_name, targets=list(every), saved=list(saved))
    warn_of_ties(model, targets)

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
        rest = {name: nn.Parameter(adapters[name].init_from_weight(m.weight), False) for name, m in modules.items()}  # type: ignore

    injection.frozen = [clean_fqn(name) for name, parameter in base_parameters(model) if parameter.requires_grad]
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    for name, target in every.items():
        layer = _adapted(target)
        layer._active.append(adapter_name)
        if target.tied_to is None:
            layer.lora[adapter_name] = adapters[name]
    shard_adapters(model, [target.module for target in targets.values()], adapter_name)  # type: ignore[misc]
    for target in tokens.values():
        if target.tied_to is not None:
            target.module.lora = tokens[target.tied_to].module.lora
    for name, weight in rest.items():
        full_name = f"{name}.weight".lstrip(".")
        injection.whole[full_name], injection.rest[full_name] = swap_parameters(modules[name], "weight", weight), weight
    _train_in_full(model, trained, injection)
    freeze_norms(model, injection)
    leave_fused_path(model, injection)
    model.__dict__.setdefault(ATTRIBUTE, []).append(injection)
    return model


def _adapted(target: Target) -> LoraLayer:
    """The layer of a target, which takes on its new class unless it has it already."""
    layer: Any = target.module
    if not isinstance(layer, LoraLayer):
        layer.__class__ = adapted_class(target.layer_class, type(layer))  # type: ignore[arg-type]
        layer.__dict__.update(_base_weights={}, _active=[], _rows=None)  # not in the module's own state dict
        layer.lora = nn.ModuleDict()
    return layer  # type: ignore[no-any-return]


def put_trained(root: nn.Module, injection: Injection, in_place: bool) -> None:
    """Put what an injection trains in full, or has left of the base, into the model; or the base's own back."""
    if in_place != injection.in_place:
        mine, of_base = {**injection.trained, **injection.rest}, {**injection.originals, **injection.whole}
        put_parameters(root, mine if in_place else of_base)
        injection.in_place = in_place


def find_again(model: nn.Module) -> None:
    """Take note of the parameters that sharding or materializing has put in the place of those trained in full."""
    for _, root, injection in injections(model):
        if injection.in_place:
            parameters = parameters_by_name(root)
            for mine in (injection.trained, injection.rest):
                mine.update({name: parameters[name] for name in mine})


def _parameters_to_train(
    model: nn.Module, targets: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str
) -> dict[str, nn.Parameter]:
    names = [clean_fqn(f"{saved_name}.{name}") for saved_name, m in saved.items() for name, _ in m.named_parameters()]
    if bias == "lora_only":
        names += [f"{name}.bias" for name, module in targets.items() if getattr(module, "bias", None) is not None]
    parameters = parameters_by_name(model)
    if bias == "all":
        names += [name for name in parameters if name.split(".")[-1] == "bias"]
    free = {id(parameter) for _, parameter in base_parameters(model)}  # another injection may train some already
    wanted = {name.lstrip("."): parameters[name.lstrip(".")] for name in names}
    return {name: parameter for name, parameter in wanted.items() if id(parameter) in free}


def _train_in_full(model: nn.Module, trained: dict[str, nn.Parameter], injection: Injection) -> None:
    """Train copies, so that the base's own parameters stay as they are."""
    copies = {id(parameter): nn.Parameter(parameter.detach().clone()) for parameter in trained.values()}
    injection.originals = trained
    injection.trained = {name: copies[id(parameter)] for name, parameter in trained.items()}
    if is_sharded(model):  # the strategy keeps the very objects, so the copies are what stays as it is
        injection.originals, injection.trained = injection.trained, injection.originals
    put_parameters(model, injection.trained)
    for parameter in injection.trained.values():
        parameter.requires_grad_(True)


def put_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        return
    modules = {clean_fqn(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, parameter in parameters.items():
        module_name, _, attribute = name.rpartition(".")
        owner = modules[module_name]
        if is_shard(owner, attribute):
            load_full(owner, attribute, parameter)
        else:
            parameter.data = parameter.data.to(getattr(owner, attribute).device)
            setattr(owner, attribute, parameter)
