"""Which modules of a model a config means, and what to say when it means none."""

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.class_names import is_a
from lightning_lora.config import AUTO, LoraConfig
from lightning_lora.fqn import base_modules, clean_fqn, is_submodule, outermost
from lightning_lora.layers import (
    LoraLayer,
    LoraParameters,
    Target,
    layer_class_for,
    storage_of,
    supported_modules,
    unsupported_reason,
    weightless_reason,
)
from lightning_lora.layers.fused_qkv import NAMES, LoraFusedLinear, fused_class_for
from lightning_lora.model.weight_reads import Read, weight_reads
from lightning_lora.patterns import fullmatch
from lightning_lora.sharding import named_tensors

Reads: TypeAlias = Mapping[str, list[Read]]


class TargetError(ValueError):
    """The config does not fit the model: nothing matched, or what matched cannot be adapted."""


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model but adapters under their clean names, in the model's order."""
    return {clean_fqn(name): module for name, module in base_modules(model)}


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, Target]:
    """The modules to adapt, by name, in the model's order.

    Raises:
        TargetError: If nothing matches, or a match is of a kind that cannot be adapted.
    """
    saved = find_modules_to_save(model, config)
    names = modules_by_name(model)
    reads = weight_reads(names)
    modules = _find_layers(model, names, saved, config, reads)
    parameters = _find_parameters(names, saved, config, reads)
    tokens_only = config.trainable_token_indices and not config.target_modules and not config.target_parameters
    if not modules and not parameters and not tokens_only:
        raise TargetError(_nothing_matched(names, config))
    targets = {}
    for name, module in names.items():
        if name in modules and name in parameters:
            raise TargetError(
                f"{name!r} is matched by target_modules and its {', '.join(parameters[name])} by target_parameters: "
                "take it out of one of them. Nothing was changed."
            )
        parent = names[name.rpartition(".")[0]] if name else None
        if name in parameters:
            targets[name] = Target(name, module, parent, LoraParameters, tuple(parameters[name]))
        elif name in modules:
            fused_class = fused_class_for(module, parent, name) if config.fused_qkv else None
            layer_class = fused_class or layer_class_for(module)
            if layer_class is None:
                raise TargetError(
                    f"target_modules matches {name!r}, which is a {_kind(module)} and cannot be adapted; supported are "
                    f"{supported_modules()} and their subclasses. Name the layers inside of it, its parameters with "
                    "target_parameters, or leave it out with exclude_modules. Nothing was changed."
                )
            targets[name] = Target(name, module, parent, layer_class, layer_class.parameters_of(module))
    for name, target in targets.items():
        if not isinstance(target.module, LoraLayer):
            reason = unsupported_reason(target, config)
        else:  # an adapted layer can have more adapters, but a parameter not of every kind
            is_parameter = issubclass(target.layer_class, LoraParameters)
            reason = target.layer_class.unsupported_reason(target, config) if is_parameter else None
        reason = reason or (_bypassed_by_parent(name, names, reads) if name in modules else None)
        if reason:
            which = (
                f"{target.parameters[0]!r} of {name!r}"
                if issubclass(target.layer_class, LoraParameters)
                else f"{name!r}"
            )
            raise TargetError(
                f"The targets match {which}, which is a {_kind(target.module)} and cannot be adapted: {reason}. "
                "Leave it out with exclude_modules, or name others. Nothing was changed."
            )
    if config.fused_qkv and not any(issubclass(target.layer_class, LoraFusedLinear) for target in targets.values()):
        raise TargetError(
            f"fused_qkv={config.fused_qkv!r} chooses parts of projections that compute query, key and value in one, "
            f"and none of the {len(targets)} targets is one ({', '.join(NAMES)}): leave it out, or target one of "
            "these. Nothing was changed."
        )
    _warn_of_dead_patterns(modules, parameters, config)
    return targets


def _find_layers(
    model: nn.Module, names: dict[str, nn.Module], saved: Collection[str], config: LoraConfig, reads: Reads
) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` means."""
    if config.layer_groups:
        heads = _output_embeddings(model)
        layers = {name: module for name, module in names.items() if _group(module) and module not in heads}
        layers = {name: module for name, module in layers.items() if _is_wanted(name, saved, config)}
        meant = {name: module for name, module in layers.items() if _group(module) in config.layer_groups}
        left_out = {name: reason for name, module in meant.items() if (reason := _left_out(name, module, config))}
        if left_out:
            shown = "; ".join(f"{name!r}: {reason}" for name, reason in left_out.items())
            rank_zero_warn(f"{config.target_modules} leaves out {shown}.")
        _warn_of_other_groups(model, layers, config)
        meant = {name: module for name, module in meant.items() if name not in left_out}
        meant = {name: module for name, module in meant.items() if not _is_read(name, module, config, reads)}
        return {name: module for name, module in meant.items() if not _bypassed_by_parent(name, names, reads)}
    found = {name: module for name, module in names.items() if matches(name, config.target_modules)}
    found = dict(each for name, module in found.items() for each in _layers_in(name, module, names))
    return {name: module for name, module in found.items() if _is_wanted(name, saved, config)}


def _layers_in(name: str, module: nn.Module, names: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """A module that can be adapted, and of another one the layers inside of it, if there are any."""
    if isinstance(module, LoraLayer) or layer_class_for(module) is not None:
        yield name, module
        return
    inside = [(inner, layer) for inner, layer in names.items() if is_submodule(inner, name) and _group(layer)]
    yield from inside or [(name, module)]


def _left_out(name: str, module: nn.Module, config: LoraConfig) -> str | None:
    """Why a layer that is meant with all others of its group is left out, if it is."""
    layer_class = layer_class_for(module)
    assert layer_class is not None
    parameters = layer_class.parameters_of(module)
    if (reason := weightless_reason(module, parameters)) is not None or layer_class.group == "linear":
        return reason
    return unsupported_reason(Target(name, module, None, layer_class, parameters), config)


def _warn_of_other_groups(model: nn.Module, layers: dict[str, nn.Module], config: LoraConfig) -> None:
    """Say so if most of a model is in layers that are not meant, and by what word they are."""
    parameters = {p for _, module in base_modules(model) for p in module.parameters(recurse=False)}
    total = sum(parameter.numel() for parameter in parameters)
    held: Counter[str] = Counter()
    for module in layers.values():
        held[_group(module)] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    words = [group for group in held if group not in config.layer_groups]
    if sum(held[group] for group in words) > total / 2:
        shown = " and ".join(f"{held[group] / total:.0%} are in {group} layers" for group in words)
        rank_zero_warn(
            f"{config.target_modules} leaves out most of the model: of its parameters, {shown}. "
            f"target_modules={'+'.join([str(config.target_modules), *words])!r} adapts them too."
        )


def _is_read(name: str, module: nn.Module, config: LoraConfig, reads: Reads) -> bool:
    """Whether the weight of a linear layer is to be adapted where it is read, if all linear layers are meant."""
    read = reads.get(f"{name}.weight".lstrip("."), ())
    called = any(each.is_called for each in read)
    by_call_alone = len(read) > 1 or LoraParameters.refused_setting(config) or storage_of(module) is not None
    return bool(read) and not (called and by_call_alone)


def _find_parameters(
    names: dict[str, nn.Module], saved: Collection[str], config: LoraConfig, reads: Reads
) -> dict[str, list[str]]:
    """By the names of the modules that read them, the parameters that are adapted where they are read.

    These are those that ``target_parameters`` means, and the weights of linear layers that are read, if all linear
    layers are meant.
    """
    found: dict[str, list[str]] = {}
    heads = _output_embeddings(names[""])
    for name, module in names.items():
        for parameter, _ in module._parameters.items():
            full_name = f"{name}.{parameter}".lstrip(".")
            meant = matches(full_name, config.target_parameters) or (
                _group(module) in config.layer_groups
                and parameter == "weight"
                and _is_read(name, module, config, reads)
                and module not in heads
            )
            if meant and _is_wanted(name, saved, config):
                reader, own = _read_at(name, parameter, names, reads)
                found.setdefault(reader, []).append(own)
    return found


def _never_called(full_name: str, reads: Reads) -> bool:
    return full_name in reads and not any(read.is_called for read in reads[full_name])


def _read_at(name: str, parameter: str, names: dict[str, nn.Module], reads: Reads) -> tuple[str, str]:
    """The module that reads a parameter of the module of a name, and the parameter's name there.

    It is one whose code is seen to read it, or else the first one around it that has a forward, which
    ``nn.ParameterList`` and its like have not.

    Raises:
        TargetError: If several do.
    """
    full_name = f"{name}.{parameter}".lstrip(".")
    readers = reads.get(full_name, [])
    if len(readers) > 1:
        raise TargetError(
            f"{full_name!r} is read by {' and '.join(repr(read.reader) for read in readers)}, and a parameter can be "
            "adapted in one of them alone: leave it out with exclude_modules. Nothing was changed."
        )
    if readers:
        return readers[0].reader, readers[0].parameter
    while name and type(names[name]).forward is nn.Module.forward:
        name, _, inner = name.rpartition(".")
        parameter = f"{inner}.{parameter}"
    return name, parameter


def _is_wanted(name: str, saved: Collection[str], config: LoraConfig) -> bool:
    return (
        not matches(name, config.exclude_modules)
        and _in_chosen_layers(name, config)
        and not any(is_submodule(name, other) for other in saved)
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_modules_to_save(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module | Tensor]:
    """What to train in full and to store with the adapter, by name: modules, and single parameters and buffers.

    Raises:
        TargetError: If a name in ``modules_to_save`` matches nothing.
    """
    if config.modules_to_save is None:
        return {}
    if config.modules_to_save == AUTO:
        return dict(_new_heads(model, config))
    found: dict[str, nn.Module | Tensor] = {}
    modules = modules_by_name(model)
    tensors = {name: getattr(module, inner) for name, module, inner in named_tensors(model, of_base=True)}
    for pattern in config.modules_to_save:
        matching: dict[str, nn.Module | Tensor] = {}
        for named in (modules, tensors):
            matching = matching or {name: each for name, each in named.items() if matches(name, [pattern])}
        if not matching:
            near = difflib.get_close_matches(pattern, _suffixes([*modules, *tensors]), n=3)
            raise TargetError(
                f"modules_to_save names {pattern!r}, but the model has no such module or parameter"
                + (f"; near it are {', '.join(map(repr, near))}" if near else "")
                + ". Correct the name or take it out. Nothing was changed."
            )
        found.update(matching)
    return {name: each for name, each in found.items() if not any(is_submodule(name, n) for n in found if n != name)}


def parameters_in(saved: Mapping[str, nn.Module | Tensor]) -> list[str]:
    """The names of the parameters that :func:`find_modules_to_save` has found."""
    names = [name for name, each in saved.items() if isinstance(each, nn.Parameter)]
    modules = ((name, each) for name, each in saved.items() if isinstance(each, nn.Module))
    for name, module in modules:
        seen: set[nn.Parameter] = set()
        for inner, each in base_modules(module):
            for own, parameter in each._parameters.items():
                if parameter is not None and parameter not in seen:
                    seen.add(parameter)
                    names.append(clean_fqn(".".join(filter(None, (name, inner, own)))))
    return names


def pretrained_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside a module (which may be one itself), by name."""
    return outermost(model, _is_pretrained)


def _is_pretrained(module: nn.Module) -> bool:
    # Told by their attributes, so that transformers need not be imported.
    return hasattr(type(module), "base_model_prefix") and hasattr(module, "get_output_embeddings")


def is_of_diffusers(module: nn.Module) -> bool:
    """Whether a module is a model of diffusers."""
    return is_a(module, "ModelMixin", "diffusers.")


def models_with_files(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost models of transformers and of diffusers inside a module, which write themselves, by name."""
    return outermost(model, lambda module: _is_pretrained(module) or is_of_diffusers(module))


def _group(module: nn.Module) -> str:
    """The group of layers that a module is of; empty for none."""
    layer_class = layer_class_for(module)
    return "" if layer_class is None else layer_class.group


def _bypassed_by_parent(name: str, names: dict[str, nn.Module], reads: Reads) -> str | None:
    """Why an adapter on this layer would never run, if so."""
    full_name = f"{name}.weight".lstrip(".")
    if _never_called(full_name, reads):
        reader = type(names[reads[full_name][0].reader]).__name__
        return (
            f"the {reader} around it reads its weight and never calls it, so an adapter on its calls would do nothing. "
            f'target_parameters=["{full_name}"] adapts the weight where it is read'
        )
    # Torch's type for the output layer of nn.MultiheadAttention.
    if isinstance(names[name], NonDynamicallyQuantizableLinear):
        parent = type(names.get(name.rpartition(".")[0])).__name__
        return f"the {parent} around it reads its weight and never calls it, so an adapter would do nothing"
    return None


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    heads = (hf_model.get_output_embeddings() for hf_model in pretrained_models(model).values())  # type: ignore[operator]
    return {head for head in heads if head is not None}


def _new_heads(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    hf_models = {name: each for name, each in pretrained_models(model).items() if not _is_reference(each, model)}
    for hf_name, hf_model in hf_models.items():
        body = getattr(hf_model, str(hf_model.base_model_prefix), hf_model)
        output = hf_model.get_output_embeddings()  # type: ignore[operator]
        # Beside an output embedding, what is not body belongs to the pretrained head.
        if body is hf_model or output is not None:
            continue
        for name, child in hf_model.named_children():
            if child is not body:
                yield from _if_trainable(f"{hf_name}.{name}".lstrip("."), child, config)
    if hf_models and "" not in hf_models:
        yield from _siblings_of(hf_models, "", model, config)


def _is_reference(hf_model: nn.Module, model: nn.Module) -> bool:
    """Whether a frozen model is there beside the one to train, and no backbone: if more is to train than it has."""
    if any(parameter.requires_grad for parameter in hf_model.parameters()):
        return False
    training = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return training > sum(parameter.numel() for parameter in hf_model.parameters())


def _siblings_of(
    hf_models: dict[str, nn.Module], name: str, module: nn.Module, config: LoraConfig
) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}".lstrip(".")
        if full_name in hf_models:
            continue
        if any(is_submodule(hf_name, full_name) for hf_name in hf_models):
            yield from _siblings_of(hf_models, full_name, child, config)
        else:
            yield from _if_trainable(full_name, child, config)


def _if_trainable(name: str, module: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    targeted = not config.layer_groups and any(
        matches(f"{name}.{inner}".rstrip("."), config.target_modules) for inner, _ in module.named_modules()
    )
    if not targeted and any(parameter.requires_grad for parameter in module.parameters()):
        yield clean_fqn(name), module


def matches(name: str, patterns: str | list[str] | None) -> bool:
    """Whether a name is meant by one regular expression, or by one of a list of names, suffixes and globs."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return fullmatch(patterns, name, "target_modules or exclude_modules")
    return any(_matches_one(name, pattern) for pattern in patterns)


def _matches_one(name: str, pattern: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def _matches_around(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(_matches_one(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1))


def _in_chosen_layers(name: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    chosen = config.layers_to_transform
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    pattern = "|".join(map(re.escape, lists)) or r"[^.]*"
    index = re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", f"{name}.")
    return index is not None and int(index.group(1)) in ([chosen] if isinstance(chosen, int) else chosen)


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({".".join(name.split(".")[start:]) for name in names for start in range(name.count(".") + 1)})


def _nothing_matched(names: dict[str, nn.Module], config: LoraConfig) -> str:
    linear = {name: module for name, module in names.items() if layer_class_for(module)}
    groups: dict[str, int] = {}
    for name in linear:
        suffix = name.rsplit(".", 1)[-1] or "(the model itself)"
        groups[suffix] = groups.get(suffix, 0) + 1
    listing = ", ".join(f"{suffix} ({count})" for suffix, count in groups.items()) or "none"
    patterns = config.target_modules if isinstance(config.target_modules, list) else [config.target_modules]
    # Of a few: a file may name any number, and each takes milliseconds.
    near = sorted({match for p in patterns[:10] for match in difflib.get_close_matches(p, _suffixes(linear), n=3)})
    chosen = (
        f" within layers_to_transform={config.layers_to_transform}" if config.layers_to_transform is not None else ""
    )
    excluded = f" beside exclude_modules={config.exclude_modules!r}" if config.exclude_modules else ""
    parameters = f" nor target_parameters={config.target_parameters!r} a parameter" if config.target_parameters else ""
    return (
        f"target_modules={config.target_modules!r} matches no module of the model{parameters}{chosen}{excluded}. "
        + (f"Near it are {', '.join(map(repr, near))}. " if near else "")
        + f"The layers that can be adapted, by the end of their names: {listing}. Name some of these"
        + (', or pass "all-linear"' if not config.layer_groups else "")
        + ". If the model is built later, inject after it is built. Nothing was changed."
    )


def _warn_of_dead_patterns(modules: dict[str, nn.Module], parameters: dict[str, list[str]], config: LoraConfig) -> None:
    full_names = [f"{name}.{parameter}".lstrip(".") for name, found in parameters.items() for parameter in found]
    for setting, patterns, names in (
        ("target_modules", config.target_modules, list(modules)),
        ("target_parameters", config.target_parameters, full_names),
    ):
        if not isinstance(patterns, list):
            continue
        # Or a module around it, which means the layers inside of it.
        dead = [pattern for pattern in patterns if not any(_matches_around(name, pattern) for name in names)]
        if dead:
            rank_zero_warn(
                f"{setting} {', '.join(map(repr, dead))} matched nothing to adapt, while the other patterns matched "
                f"{len(modules) + len(full_names)}: check the spelling, or take it out."
            )
