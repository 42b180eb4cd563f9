"""Which modules of a model a config means, and what to say when it means none."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.config import ALL_LINEAR, AUTO, LoraConfig
from lightning_lora.fqn import clean_fqn, is_submodule
from lightning_lora.layers import (
    LoraLayer,
    LoraParameters,
    Target,
    layer_class_for,
    supported_modules,
    unsupported_reason,
)
from lightning_lora.layers.fused_qkv import NAMES, LoraFusedLinear, fused_class_for
from lightning_lora.patterns import fullmatch

# Transformers' modules that read the weights of these layers of theirs and never call them.
_READ_BY = {
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MambaMixer": ("dt_proj",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


class TargetError(ValueError):
    """The config does not fit the model: nothing matched, or what matched cannot be adapted."""


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model under their clean names, in the model's order."""
    return {clean_fqn(name): module for name, module in model.named_modules()}


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, Target]:
    """The modules to adapt, by name, in the model's order.

    Raises:
        TargetError: If nothing matches, or a match is of a kind that cannot be adapted.
    """
    saved = find_modules_to_save(model, config)
    names = modules_by_name(model)
    modules = _find_layers(model, names, saved, config)
    parameters = _find_parameters(names, saved, config)
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
        reason = None if isinstance(target.module, LoraLayer) else unsupported_reason(target, config)
        reason = reason or _bypassed_by_parent(name, names)
        if reason:
            raise TargetError(
                f"The targets match {name!r}, which is a {_kind(target.module)} and cannot be adapted: {reason}. "
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
    model: nn.Module, names: dict[str, nn.Module], saved: dict[str, nn.Module], config: LoraConfig
) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` means."""
    if config.target_modules == ALL_LINEAR:
        heads = _output_embeddings(model)
        found = {name: module for name, module in names.items() if _is_linear(module) and module not in heads}
        found = {name: module for name, module in found.items() if not _bypassed_by_parent(name, names)}
    else:
        found = {name: module for name, module in names.items() if matches(name, config.target_modules)}
    return {name: module for name, module in found.items() if _is_wanted(name, saved, config)}


def _find_parameters(
    names: dict[str, nn.Module], saved: dict[str, nn.Module], config: LoraConfig
) -> dict[str, list[str]]:
    """By the names of their modules, the parameters that ``target_parameters`` means."""
    found: dict[str, list[str]] = {}
    for name, module in names.items():
        for parameter in module._parameters:
            full_name = f"{name}.{parameter}".lstrip(".")
            if matches(full_name, config.target_parameters) and _is_wanted(name, saved, config):
                found.setdefault(name, []).append(parameter)
    return found


def _is_wanted(name: str, saved: dict[str, nn.Module], config: LoraConfig) -> bool:
    return (
        not matches(name, config.exclude_modules)
        and _in_chosen_layers(name, config)
        and not any(is_submodule(name, other) for other in saved)
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_modules_to_save(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules to train in full and to store with the adapter, by name.

    Raises:
        TargetError: If a name in ``modules_to_save`` matches no module.
    """
    if config.modules_to_save is None:
        return {}
    if config.modules_to_save == AUTO:
        return dict(_new_heads(model, config))
    found = {}
    names = modules_by_name(model)
    for pattern in config.modules_to_save:
        matching = {name: module for name, module in names.items() if matches(name, [pattern])}
        if not matching:
            near = difflib.get_close_matches(pattern, _suffixes(names), n=3)
            raise TargetError(
                f"modules_to_save names {pattern!r}, but the model has no such module"
                + (f"; near it are {', '.join(map(repr, near))}" if near else "")
                + ". Correct the name or take it out. Nothing was changed."
            )
        found.update(matching)
    return {
        name: module for name, module in found.items() if not any(is_submodule(name, n) for n in found if n != name)
    }


def pretrained_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside a module (which may be one itself), by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # Told by their attributes, so that transformers need not be imported.
        is_pretrained = hasattr(type(module), "base_model_prefix") and hasattr(module, "get_output_embeddings")
        if is_pretrained and not any(is_submodule(name, outer) for outer in found):
            found[name] = module
    return found


def _is_linear(module: nn.Module) -> bool:
    layer_class = layer_class_for(module)
    return layer_class is not None and layer_class.is_linear


def _bypassed_by_parent(name: str, names: dict[str, nn.Module]) -> str | None:
    """Why an adapter on this layer would never run, if so."""
    holder_name, _, child = name.rpartition(".")
    parent = type(names.get(holder_name))
    read = child in _READ_BY.get(parent.__name__, ()) and parent.__module__.startswith("transformers.")
    # Torch's type for the output layer of nn.MultiheadAttention.
    if read or isinstance(names[name], NonDynamicallyQuantizableLinear):
        return f"the {parent.__name__} around it reads its weight and never calls it, so an adapter would do nothing"
    return None


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    heads = (hf_model.get_output_embeddings() for hf_model in pretrained_models(model).values())  # type: ignore[operator]
    return {head for head in heads if head is not None}


def _new_heads(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    hf_models = pretrained_models(model)
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
    targeted = config.target_modules != ALL_LINEAR and any(
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
    near = sorted({match for p in patterns for match in difflib.get_close_matches(p, _suffixes(linear), n=3)})
    chosen = (
        f" within layers_to_transform={config.layers_to_transform}" if config.layers_to_transform is not None else ""
    )
    excluded = f" beside exclude_modules={config.exclude_modules!r}" if config.exclude_modules else ""
    parameters = f" nor target_parameters={config.target_parameters!r} a parameter" if config.target_parameters else ""
    return (
        f"target_modules={config.target_modules!r} matches no module of the model{parameters}{chosen}{excluded}. "
        + (f"Near it are {', '.join(map(repr, near))}. " if near else "")
        + f"The layers that can be adapted, by the end of their names: {listing}. Name some of these"
        + (', or pass "all-linear"' if config.target_modules != ALL_LINEAR else "")
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
        dead = [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]
        if dead:
            rank_zero_warn(
                f"{setting} {', '.join(map(repr, dead))} matched nothing to adapt, while the other patterns matched "
                f"{len(modules) + len(full_names)}: check the spelling, or take it out."
            )
