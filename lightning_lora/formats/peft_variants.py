"""What variants and earlier versions of PEFT wrote, turned into the tensors of a plain LoRA for a given model.

Each function here takes the file's settings and tensors, under PEFT's names, and gives those of an adapter that
computes the same and that this package holds. None changes the model.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.peft_config import config_from_peft
from lightning_lora.formats.peft_files import OF_LAYER, PREFIX, PeftFiles, layers_in
from lightning_lora.formats.transformers_names import in_todays_names
from lightning_lora.fqn import listed
from lightning_lora.layers.conv import is_misrun_by_peft
from lightning_lora.layers.loftq import is_rounded
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import find_modules_to_save, matches, modules_by_name
from lightning_lora.patterns import fullmatch, require_expression
from lightning_lora.sharding import full_tensor

Tensors = dict[str, Tensor]

_BASE_WEIGHT = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+?)(?:\.token_adapter)?(?:\.base_layer)+\.weight")


def as_plain_lora(files: PeftFiles, base: nn.Module) -> tuple[LoraConfig, Tensors]:
    """The settings and tensors, for this package to hold, of what PEFT saved.

    Args:
        files: The files.
        base: The model that PEFT would wrap, to be read and not changed.

    Raises:
        CheckpointError: If they are of a variant that cannot be held, or do not go with this model.
    """
    settings, tensors, source = files.settings, dict(files.tensors), files.config_file
    config = config_from_peft(settings, source)
    if files.start is not None:
        config = dataclasses.replace(config, init_lora_weights=files.start)
    config = _on_packed_weights(config, tensors, base, source)
    modules = modules_by_name(base)
    _require_tied_alike(tensors, modules, str(files.directory))
    if settings["peft_type"] == "TRAINABLE_TOKENS":
        return config, _rows_of_tokens(tensors, modules)
    if settings["peft_type"] == "LORA":
        if settings.get("velora_config"):
            tensors = {name: tensor for name, tensor in tensors.items() if ".lora_velora_" not in name}
        if settings.get("use_bdlora"):
            tensors = _without_blocks(tensors, settings["use_bdlora"], config, modules, source)
        if files.is_trained_by_peft:
            config = _with_order_of_patterns(config, tensors, source)
        tensors = _as_peft_runs(tensors, files, modules)
        config, tensors = in_todays_names(config, tensors, base, str(files.directory))
        tensors = _experts_in_todays_layout(config, tensors, files, modules)
        if settings.get("lora_bias"):
            config, tensors = _biases_in_full(config, tensors, modules, source)
        if settings.get("ensure_weight_tying"):
            config = _with_tied_targets(config, tensors, modules)
    if files.is_trained_by_peft:  # else they are whole names
        config = _with_layers_of_peft(config, modules)
        config = _with_modules_of_peft(config, tensors, modules)
    return _with_stored_embeddings(config, tensors, base, str(files.directory))


def _on_packed_weights(config: LoraConfig, tensors: Tensors, base: nn.Module, source: str) -> LoraConfig:
    """LoftQ is for a base that is kept in these bits, which is one that need not be rounded again."""
    if config.quantization is None:
        return config
    bits, iterations = config.quantization
    layers = layers_in(tensors)
    packed = [found for found in quantized_layers(base) if found[0] in layers]
    if len(packed) < len(layers):
        return config
    if not all(is_rounded(storage.dequantized(module, weight), bits) for _, module, storage, weight in packed):
        return config
    if iterations > 1:
        rank_zero_warn(
            f"{source} is of LoftQ in {iterations} iterations, which changes more of a base than its bits: it is right "
            "if this one was made of the weights that LoftQ left, and not of those before."
        )
    return dataclasses.replace(config, init_lora_weights=True)


def _require_tied_alike(tensors: Tensors, modules: Mapping[str, nn.Module], source: str) -> None:
    """PEFT trains tied weights apart if each is to be trained in full, and one weight cannot hold both."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        layer, _, inner = name.removeprefix(PREFIX).rpartition(".")
        weight = getattr(modules.get(layer), inner, None)
        first = names.setdefault(id(weight), name)
        if isinstance(weight, nn.Parameter) and first != name and not same_but_for_rounding(tensors[first], tensor):
            raise CheckpointError(
                f"{source} holds {first!r} and {name!r}, which were trained apart and are one weight in this "
                "model: give each module a Parameter of its own before the adapter is loaded. Nothing was loaded."
            )


def _rows_of_tokens(tensors: Tensors, modules: Mapping[str, nn.Module]) -> Tensors:
    """Trained rows have another name in a LoRA, where those of what is tied to an embedding are stored once."""
    ending = ".trainable_tokens_delta"
    rows = {name.removeprefix(PREFIX).removesuffix(ending): name for name in tensors if name.endswith(ending)}
    rows = {layer.removesuffix(".token_adapter"): name for layer, name in rows.items()}
    weights = {layer: id(getattr(modules.get(layer), "weight", None)) for layer in rows}
    found = {name: tensor for name, tensor in tensors.items() if name not in rows.values()}
    for layer, name in rows.items():
        of_embeddings = [
            rows[other]
            for other in rows
            if weights[other] == weights[layer] and isinstance(modules.get(other), nn.Embedding)
        ]
        is_copy = of_embeddings and name not in of_embeddings and torch.equal(tensors[name], tensors[of_embeddings[0]])
        if not is_copy:
            found[f"{PREFIX}{layer}.token_adapter{ending}"] = tensors[name]
    return found


def _without_blocks(
    tensors: Tensors, bdlora: Mapping[str, Any], config: LoraConfig, modules: Mapping[str, nn.Module], source: str
) -> Tensors:
    """BD-LoRA stores the blocks of a block-diagonal A or B under each other; as a whole it is a plain LoRA."""
    blocks = bdlora.get("nblocks", 1)
    if type(blocks) is not int or blocks < 1:
        raise CheckpointError(f"{source} sets nblocks={blocks!r} in use_bdlora: it must be a number of blocks.")
    whole = dict(tensors)
    for layer in layers_in(tensors):
        names = [f"{PREFIX}{layer}.lora_{matrix}.weight" for matrix in "AB"]
        if any(name not in tensors or tensors[name].dim() != 2 for name in names):
            continue
        lora_A, lora_B = (tensors[name] for name in names)
        in_features = getattr(modules.get(layer), "in_features", 0)
        for name, tensor, is_cut in (
            (names[0], lora_A, lora_A.shape[-1] * blocks == in_features and blocks > 1),
            (names[1], lora_B, lora_B.shape[-1] * blocks == config.rank(layer) and blocks > 1),
        ):
            if is_cut and len(tensor) % blocks == 0:
                whole[name] = torch.block_diag(*tensor.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole


def _as_peft_runs(tensors: Tensors, files: PeftFiles, modules: Mapping[str, nn.Module]) -> Tensors:
    """Two kinds of layers that PEFT, up to 0.21 at least, does not run as the update in its file says.

    It adds that of the output projection of ``nn.MultiheadAttention`` twice, also when it merges. What it does under
    some convolutions cannot be held.
    """
    if not files.is_trained_by_peft:
        return tensors
    found = dict(tensors)
    for layer in layers_in(tensors):
        module, lora_B = modules.get(layer), f"{PREFIX}{layer}.base_layer.out_proj.lora_B.weight"
        if isinstance(module, nn.MultiheadAttention) and lora_B in tensors:
            found[lora_B] = 2 * tensors[lora_B]
        if module is not None and is_misrun_by_peft(module):
            raise CheckpointError(
                f"{files.directory} was trained by PEFT on {layer!r}, a convolution with padding_mode="
                f"{module.padding_mode!r} and dilation={module.dilation}, which PEFT leaves out until it merges: "
                "what was trained is no update of its weight. Nothing was loaded."
            )
    return found


def _experts_in_todays_layout(
    config: LoraConfig, tensors: Tensors, files: PeftFiles, modules: Mapping[str, nn.Module]
) -> Tensors:
    """Before PEFT 0.19, A and B of stacked experts were for ``(experts, in, out)``, whatever their layout is."""
    todays = dict(tensors)
    version = re.match(r"(\d+)\.(\d+)", str(files.settings.get("peft_version") or ""))
    for layer, owner in modules.items():
        adapted = [
            parameter
            for name, parameter in owner._parameters.items()
            if parameter is not None and matches(f"{layer}.{name}".lstrip("."), config.target_parameters)
        ]
        if not adapted or getattr(owner, "is_transposed", False) or not files.is_trained_by_peft:
            continue
        for depth, parameter in enumerate(reversed(adapted)):  # PEFT wraps once for each, the first innermost
            names = [f"{PREFIX}{layer}{'.base_layer' * depth}.lora_{matrix}.weight" for matrix in "AB"]
            if parameter.dim() != 3 or any(name not in tensors or tensors[name].dim() != 2 for name in names):
                continue
            lora_A, lora_B = (tensors[name] for name in names)
            experts, out_features, in_features = parameter.shape
            sizes = lora_A.shape[-1], len(lora_B)
            fits_today, fits_before = sizes == (in_features, out_features), sizes == (out_features, in_features)
            if fits_today and fits_before and version is None:
                raise CheckpointError(
                    f"{files.config_file} has no peft_version, and the experts of {layer!r} are square, so that their "
                    "layout, another one before PEFT 0.19, cannot be told: add the version that wrote it. Nothing "
                    "was loaded."
                )
            is_old = version is not None and (int(version[1]), int(version[2])) < (0, 19)
            if not fits_before or (fits_today and not is_old) or len(lora_A) % experts:
                continue
            r = len(lora_A) // experts
            todays[names[0]] = lora_B.reshape(in_features, r, experts).permute(2, 1, 0).reshape(-1, in_features)
            todays[names[1]] = lora_A.reshape(experts, r, out_features).permute(2, 1, 0).reshape(out_features, -1)
    return todays


def _biases_in_full(
    config: LoraConfig, tensors: Tensors, modules: Mapping[str, nn.Module], source: str
) -> tuple[LoraConfig, Tensors]:
    """``lora_bias`` adds a scaled bias to that of the layer: together they are a bias that is trained in full."""
    ending = ".lora_B.bias"
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    for name in tensors.keys() - rest.keys():
        layer = name.removeprefix(PREFIX).removesuffix(ending)
        bias = getattr(modules.get(layer), "bias", None)
        if bias is None or config.use_dora:
            raise CheckpointError(
                f"{source} sets lora_bias, and {layer!r} "
                + ("is adapted by DoRA" if config.use_dora else "has no bias here that it could be added to")
                + ": such an adapter is not supported. Nothing was loaded."
            )
        own = f"{PREFIX}{layer}.base_layer.bias"
        below = tensors.get(own, full_tensor(modules[layer], "bias").detach().cpu())
        if below.shape != tensors[name].shape:
            continue  # left over, so that its shape is named
        rest[own] = below + config.scaling(layer) * tensors[name].to(below.dtype)
    for layer in layers_in(rest):  # all adapted layers with a bias must have one then
        bias, own = getattr(modules.get(layer), "bias", None), f"{PREFIX}{layer}.base_layer.bias"
        if bias is not None and own not in rest:
            rest[own] = full_tensor(modules[layer], "bias").detach().cpu()
    return (dataclasses.replace(config, bias="lora_only") if config.bias == "none" else config), rest


def _with_tied_targets(config: LoraConfig, tensors: Tensors, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """With ``ensure_weight_tying``, PEFT adapts what is tied to a target alike: here it has an adapter of its own."""
    if not isinstance(config.target_modules, list):
        return config
    found = [layer for layer in layers_in(tensors) if layer in modules]
    declared = [layer for layer in found if matches(layer, config.target_modules)]
    weights = {id(getattr(modules[layer], "weight", None)) for layer in declared}
    tied = [
        layer for layer in found if layer not in declared and id(getattr(modules[layer], "weight", None)) in weights
    ]
    return dataclasses.replace(config, target_modules=[*config.target_modules, *tied]) if tied else config


def _with_order_of_patterns(config: LoraConfig, tensors: Tensors, source: str) -> LoraConfig:
    """PEFT's first pattern counts, and its file has them sorted: the tensors tell which ranks were first."""
    ranks: dict[str, int] = {}
    lost: list[str] = []
    for name, tensor in tensors.items():
        found = OF_LAYER.fullmatch(name)
        if found is None or found["inner"] not in ("lora_A.weight", "lora_embedding_A"):
            continue
        layer = found["layer"]
        possible = _values_of(config.rank_pattern, layer, "rank_pattern")
        if len(possible) > 1 and len(tensor) in possible:
            ranks[re.escape(layer)] = len(tensor)
        if len(_values_of(config.alpha_pattern, layer, "alpha_pattern")) > 1:
            lost.append(layer)
    if lost:
        rank_zero_warn(
            f"{source} has several alpha_pattern for {listed(list(map(repr, lost)), 2)}, and PEFT sorts them when it "
            "saves: the first one in the file is taken, as PEFT does. If another one was the first in training, put "
            "it first."
        )
    return dataclasses.replace(config, rank_pattern={**ranks, **config.rank_pattern}) if ranks else config


def _values_of(patterns: Mapping[str, float], layer: str, setting: str) -> set[float]:
    """What the patterns that match a layer say."""
    return {value for pattern, value in patterns.items() if fullmatch(rf"(.*\.)?({pattern})", layer, setting)}


def _with_layers_of_peft(config: LoraConfig, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """Name what is adapted where blocks are chosen, as PEFT chooses it: of what is not targeted by its whole name.

    Stacked parameters it does not choose from, and no blocks at all are none that are chosen.
    """
    chosen, targets = config.layers_to_transform, config.target_modules
    if chosen is None or not isinstance(targets, list):
        return config
    indices = [chosen] if isinstance(chosen, int) else chosen
    if indices:
        given = config.layers_pattern
        patterns = [given] if isinstance(given, str) else given or [r".*\.[^.]*"]
        for pattern in patterns:
            require_expression(pattern, "layers_pattern")
        targets = [
            name
            for name in modules
            if name in targets or (matches(name, targets) and _block_of(name, patterns) in indices)
        ]
    return dataclasses.replace(config, target_modules=targets, layers_to_transform=None, layers_pattern=None)


def _block_of(name: str, patterns: list[str]) -> int | None:
    """The first number in a name, but for its end, that follows what one of these expressions matches."""
    parts = name.split(".")
    for pattern in patterns:
        for place, part in enumerate(parts[1:-1], start=1):
            if part.isdecimal() and fullmatch(rf"(?:.*\.)?(?:{pattern})", ".".join(parts[:place]), "layers_pattern"):
                return int(part)
    return None


def _with_modules_of_peft(config: LoraConfig, tensors: Tensors, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """Name the modules that are trained in full as PEFT finds them: by how their names end, in the midst of a part too.

    So ``"norm"`` is each ``input_layernorm``, too. For classifiers, PEFT writes the names of all heads that it knows:
    those that neither the model nor the file has are left out.
    """
    if not isinstance(config.modules_to_save, list):
        return config
    stored = [f".{name.removeprefix(PREFIX)}." for name in tensors]
    found: list[str] = []
    for ending in config.modules_to_save:
        is_stored = any(f".{ending}." in name for name in stored)
        found += [name for name in modules if name.endswith(ending)] or [ending] * is_stored
    return dataclasses.replace(config, modules_to_save=list(dict.fromkeys(found)) or None)


def _with_stored_embeddings(
    config: LoraConfig, tensors: Tensors, base: nn.Module, source: str
) -> tuple[LoraConfig, Tensors]:
    """Of a resized vocabulary, or if it is asked to, PEFT stores the embeddings of the base in full.

    Those that are the model's own are left out, and others are read as modules that are trained in full.
    """
    modules = modules_by_name(base)
    kept = dict(tensors)
    for name in tensors:
        found = _BASE_WEIGHT.fullmatch(name)
        module = modules.get(found["layer"]) if found is not None else None
        if module is None or "weight" not in module._parameters:
            continue
        if not _is_weight_of(module, tensors[name]):
            raise CheckpointError(
                f"{source} holds the base's weight of {found['layer']!r}, which it adapts, and it is not this model's"  # type: ignore[index]
                f"{_sizes(tensors[name], module)}: it was trained on another base, as one whose vocabulary was resized "
                "is. Load it onto that one. Nothing was loaded."
            )
        del kept[name]
    saved = {} if config.modules_to_save is None else find_modules_to_save(base, config)
    stored: dict[str, nn.Module] = {}
    for layer, module in _embeddings(base, modules):
        name = f"{PREFIX}{layer}.weight"
        if name not in kept or any(layer == other or layer.startswith(f"{other}.") for other in saved):
            continue
        if _is_weight_of(module, kept[name]):
            del kept[name]
        elif kept[name].shape != module.weight.shape:
            raise CheckpointError(
                f"{source} holds the embedding {layer!r} in full, and its vocabulary is another one than this model's"
                f"{_sizes(kept[name], module)}: call resize_token_embeddings({len(kept[name])}) before the adapter is "
                "loaded. Nothing was loaded."
            )
        else:
            stored[layer] = module
    if not stored:
        return config, kept
    by_weight = {id(module.weight): f"{PREFIX}{layer}.weight" for layer, module in stored.items()}
    for layer, module in modules.items():  # what is tied to them stays so
        weight = id(module._parameters.get("weight"))
        if weight in by_weight and not any(matches(layer, [other]) for other in saved):
            stored[layer] = module
            kept.setdefault(f"{PREFIX}{layer}.weight", kept[by_weight[weight]])
    names = [*(config.modules_to_save or []), *stored]
    return dataclasses.replace(config, modules_to_save=names), kept


def _embeddings(base: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The input and output embeddings of a transformers model, by name."""
    found: list[Any] = []
    for side in ("input", "output"):
        with suppress(NotImplementedError):  # transformers' answer for models that have none
            found += [ask() for ask in [getattr(base, f"get_{side}_embeddings", None)] if callable(ask)]
    for name, module in modules.items():
        if any(module is each for each in found) and "weight" in module._parameters:
            yield name, module


def _is_weight_of(module: nn.Module, tensor: Tensor) -> bool:
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.is_meta or weight.shape != tensor.shape:
        return False
    return same_but_for_rounding(full_tensor(module, "weight").detach().cpu(), tensor)


def _sizes(tensor: Tensor, module: Any) -> str:
    return f" ({tuple(tensor.shape)} in the file, {tuple(module.weight.shape)} here)"


def same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to the precision of the coarser dtype."""
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return False
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (one, other))
    return torch.allclose(one.double(), other.double(), rtol=eps, atol=1e-6)
