"""Adapters under the names that layers had in transformers 4, as transformers 5 says what became of them.

Most were renamed. Experts of a mixture were layers of their own and are stacked in one tensor now, gate and up in one:
their A are put under each other, and their B beside each other in blocks, which computes the same.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.peft_files import OF_LAYER, PREFIX, layers_in
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import matches, modules_by_name

Tensors = dict[str, Tensor]
_TodaysName = Callable[[str], tuple[str, Any, Any]]  # the name, its converter if any, and the pattern that matched
# Transformers' operations for experts: stacked, and if there are several projections, these beside each other.
_STACKED = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


class _Part(NamedTuple):
    """What a layer of its own is now in a stacked parameter: which expert's, which of how many projections."""

    layer: str
    expert: int
    projection: int
    projections: int


def in_todays_names(config: LoraConfig, tensors: Tensors, base: nn.Module, source: str) -> tuple[LoraConfig, Tensors]:
    """Turn an adapter of layers that a model has under other names now into one of these.

    Args:
        config: Its settings.
        tensors: Its tensors, under PEFT's names.
        base: The model that PEFT would wrap.
        source: The file, for errors.

    Returns:
        Both, as they were if the model has all layers, or transformers does not know the names.

    Raises:
        CheckpointError: If experts do not fit those of the model.
    """
    modules = modules_by_name(base)
    old = [layer for layer in layers_in(tensors) if layer not in modules]
    todays_name = _todays_name(base) if old else None
    if todays_name is None:
        return config, tensors
    renamed, stacked = _moved(old, modules, todays_name, source)
    found: Tensors = {}
    for name, tensor in tensors.items():
        of_layer = OF_LAYER.fullmatch(name)
        layer = of_layer["layer"] if of_layer is not None else name.removeprefix(PREFIX).rpartition(".")[0]
        layer = layer.removesuffix(".base_layer")
        if layer in renamed:
            name = name.replace(f"{PREFIX}{layer}.", f"{PREFIX}{renamed[layer]}.", 1)
        elif of_layer is None and layer not in modules:  # of a module that was trained in full
            name = PREFIX + todays_name(name.removeprefix(PREFIX))[0]
        found[name] = tensor
    parameters = [*(config.target_parameters or []), *stacked]
    own_ranks = {re.escape(new): config.rank(layer) for layer, new in renamed.items()}
    own_alphas = {re.escape(new): config.alpha(layer) for layer, new in renamed.items()}
    ranks = {new: rank for new, rank in own_ranks.items() if rank != config.r}
    alphas = {new: alpha for new, alpha in own_alphas.items() if alpha != config.lora_alpha}
    for name, parts in stacked.items():
        owner, _, attribute = name.rpartition(".")
        adapted = [each for each in modules[owner]._parameters if matches(f"{owner}.{each}".lstrip("."), parameters)]
        wrappers = ".base_layer" * (len(adapted) - 1 - adapted.index(attribute))
        rank, scaling, pair = _stack(parts, config, found, modules[owner], attribute, source)
        for matrix, tensor in pair.items():
            found[f"{PREFIX}{owner}{wrappers}.{matrix}.weight"] = tensor
        ranks[re.escape(name)] = rank
        alphas[re.escape(name)] = scaling * (math.sqrt(rank) if config.use_rslora else rank)
    if stacked and config.lora_dropout:
        rank_zero_warn(
            f"{source} was trained with lora_dropout={config.lora_dropout}, and dropout is not for stacked experts: it "
            "is left out, which changes nothing but further training."
        )
    return dataclasses.replace(
        config,
        target_modules=_targets(config.target_modules, modules, renamed),
        target_parameters=parameters or None,
        rank_pattern={**ranks, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
        lora_dropout=0.0 if stacked else config.lora_dropout,
    ), found


def _moved(
    old: list[str], modules: dict[str, nn.Module], todays_name: _TodaysName, source: str
) -> tuple[dict[str, str], dict[str, list[_Part]]]:
    """Where layers have gone: the new names of some, and by stacked parameter those that are parts of it."""
    renamed: dict[str, str] = {}
    stacked: dict[str, list[_Part]] = {}
    for layer in old:
        name, converter, pattern = todays_name(f"{layer}.weight")
        owner, _, parameter = name.rpartition(".")
        if converter is None and parameter == "weight" and owner in modules:
            renamed[layer] = owner
        elif converter is not None and owner in modules and parameter in modules[owner]._parameters:
            patterns = list(converter.source_patterns)
            numbers = [int(part) for part in layer.split(".") if part.isdigit()]
            if [type(each).__name__ for each in converter.operations] not in _STACKED or not numbers:
                raise CheckpointError(
                    f"{source} adapts {layer!r}, which transformers has made a part of {name!r} in a way that is not "
                    "known here. Nothing was loaded."
                )
            stacked.setdefault(name, []).append(_Part(layer, numbers[-1], patterns.index(pattern), len(patterns)))
    return renamed, stacked


def _targets(declared: str | list[str], modules: dict[str, nn.Module], renamed: dict[str, str]) -> list[str]:
    """What is adapted, of what was declared: the parts of it that are there, and the new names."""
    if isinstance(declared, list):
        targets = [each for each in declared if any(matches(name, [each]) for name in modules)]
    else:
        targets = [name for name in modules if matches(name, declared)]
    return targets + [new for new in renamed.values() if not matches(new, targets)]


def _stack(
    parts: list[_Part], config: LoraConfig, tensors: Tensors, owner: nn.Module, attribute: str, source: str
) -> tuple[int, float, Tensors]:
    """Take the A and B of single experts out of the tensors.

    Returns:
        The rank of each expert, the factor in front of ``B A``, and A and B of all in PEFT's layout.
    """
    shape = owner.get_parameter(attribute).shape
    experts, out_features, in_features = shape if len(shape) == 3 else (0, 0, 0)
    if getattr(owner, "is_transposed", False):
        out_features, in_features = in_features, out_features
    rows = out_features // parts[0].projections
    pairs: dict[_Part, tuple[Tensor, Tensor]] = {}
    ranks = [0] * parts[0].projections
    for part in parts:
        names = [f"{PREFIX}{part.layer}.lora_{matrix}.weight" for matrix in "AB"]
        r = config.rank(part.layer)
        shapes = [tuple(tensors[name].shape) if name in tensors else None for name in names]
        if part.expert >= experts or shapes != [(r, in_features), (rows, r)]:
            raise CheckpointError(
                f"{source} has A and B of {shapes} for {part.layer!r}, and for one of {experts} experts here they must "
                f"be {[(r, in_features), (rows, r)]}: it was trained on another model, or is cut short. Nothing was "
                "loaded."
            )
        pairs[part] = tensors.pop(names[0]), tensors.pop(names[1])
        ranks[part.projection] = max(ranks[part.projection], r)
    scaling = config.scaling(parts[0].layer)
    lora_A = torch.zeros(experts, sum(ranks), in_features, dtype=pairs[parts[0]][0].dtype)
    lora_B = torch.zeros(experts, out_features, sum(ranks), dtype=pairs[parts[0]][1].dtype)
    for part, (own_A, own_B) in pairs.items():
        begin, row = sum(ranks[: part.projection]), part.projection * rows
        lora_A[part.expert, begin : begin + len(own_A)] = own_A
        own = config.scaling(part.layer)
        own_B = own_B if own == scaling else own_B * (own / scaling)
        lora_B[part.expert, row : row + rows, begin : begin + own_B.shape[1]] = own_B
    layout = {"lora_A": lora_A.flatten(0, 1), "lora_B": lora_B.permute(1, 2, 0).flatten(1)}
    return sum(ranks), scaling, layout


def _todays_name(base: Any) -> _TodaysName | None:
    """What transformers calls a weight of an earlier version today, with the converter that it goes through, if any."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4, whose models have these names
        return None
    if not hasattr(base, "base_model_prefix"):
        return None
    mapping = get_model_conversion_mapping(base)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    names: dict[Any, Any] = dict.fromkeys(base.state_dict(), True)

    def todays_name(name: str) -> tuple[str, Any, str | None]:
        found, pattern = rename_source_key(name, renamings, converters, base.base_model_prefix, names)
        converter = next((each for each in converters if pattern in each.source_patterns), None)
        return found, converter, pattern

    return todays_name
