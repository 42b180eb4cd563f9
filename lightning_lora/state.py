"""The state of adapters: collect it, say what it belongs to, check it, load it."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.config import LoraConfig
from lightning_lora.inject import Injection, adapted_layers, injections, injections_of
from lightning_lora.layers import LoraLayer
from lightning_lora.names import clean_name, is_inside
from lightning_lora.sharding import is_sharded, put, settle, shape_of, tensors_of, whole

FORMAT_VERSION = 1
_SAMPLES = 16
_BINDING = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fused_qkv",
    "trainable_token_indices", "use_vera",
)  # fmt: skip


class CheckpointError(RuntimeError):
    """Saved adapter state that cannot be used with this model. The model is left as it was."""


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors alone: every adapter, every parameter trained in full, buffers of ``modules_to_save``.

    Args:
        model: A model with adapters.

    Returns:
        The tensors under the names that ``model.state_dict()`` has for them; no copies, unless processes share the
        model. Then all must call this together, and each gets the whole tensors.
    """
    names = set(_adapter_names(model))
    if is_sharded(model):
        return gathered(model, names)
    return {name: tensor for name, tensor in model.state_dict().items() if clean_name(name) in names}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load what :func:`adapter_state_dict` gave, in place.

    Raises:
        CheckpointError: If a tensor is missing, left over or of another shape. Nothing is loaded then.
    """
    check_tensors(adapter_tensors(model), state_dict, "the state dict")
    if is_sharded(model):
        scatter(model, state_dict)
    else:
        model.load_state_dict(dict(state_dict), strict=False)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The names of :func:`adapter_state_dict`, and tensors of these shapes, without gathering anything."""
    names = set(_adapter_names(model))
    return {name: tensor for name, tensor in _tensors(model).items() if clean_name(name) in names}


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The names of what a checkpoint of a model holds, and tensors of these shapes."""
    return drop_base(model, _tensors(model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    if not is_sharded(model):
        return model.state_dict()
    return {name: torch.empty(shape_of(module, inner), device="meta") for name, module, inner in tensors_of(model)}


def gathered(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Whole tensors of a model that processes share, one after the other, so that only these are ever whole."""
    settle(model)
    return {name: whole(module, inner) for name, module, inner in tensors_of(model) if name in names}


def scatter(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load whole tensors, by their clean names, into a model that processes share."""
    settle(model)
    for name, module, inner in tensors_of(model):
        if name in state_dict:
            put(module, inner, state_dict[name])


def drop_base(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a full state dict of ``model`` what the adapters' injections hold frozen."""
    kept = set(kept_names(model, map(clean_name, state_dict)))
    return {name: value for name, value in state_dict.items() if clean_name(name) in kept}


def kept_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of the clean names of a model's tensors are those of adapters, or outside of where they were injected."""
    adapter = set(_adapter_names(model))
    roots = [f"{name}." if name else "" for name, _, _ in injections(model)]
    return [name for name in names if name in adapter or not any(name.startswith(root) for root in roots)]


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Any], source: str) -> None:
    """Require the same names and shapes.

    Raises:
        CheckpointError: Naming what differs.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} ({tuple(found[name].shape)} found, {tuple(tensor.shape)} expected)"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = [
        f"{what}: {_shorten(names)}"
        for what, names in (("missing", missing), ("left over", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The tensors in {source} do not fit the adapters of this model. {'; '.join(problems)}. Use the LoRA "
            "settings (r, target_modules, modules_to_save, ...) with which it was saved. Nothing was loaded."
        )


def metadata(model: nn.Module) -> dict[str, Any]:
    """What adapters a model has and on which base, in plain types."""
    return {
        "format_version": FORMAT_VERSION,
        "adapters": [
            {
                "module": name,
                "adapter_name": injection.adapter_name,
                "config": injection.config.to_dict(),
                "base_fingerprint": fingerprint(root, injection),
            }
            for name, root, injection in injections(model)
        ],
    }


def check_metadata(model: nn.Module, meta: Mapping[str, Any], source: str) -> None:
    """Require that saved adapters belong to this model's adapters and to this base.

    Raises:
        CheckpointError: If the format is newer, the settings differ in what the adapter computes, or the base differs.
    """
    require_known_format(meta, source)
    # Two injections may share module and name; then their targets tell them apart.
    saved = sorted(
        meta["adapters"], key=lambda entry: _identity(entry["module"], entry["adapter_name"], entry["config"])
    )
    here = sorted(
        injections(model), key=lambda item: _identity(item[0], item[2].adapter_name, item[2].config.to_dict())
    )
    saved_names = [(entry["adapter_name"], entry["module"]) for entry in saved]
    names_here = [(injection.adapter_name, name) for name, _, injection in here]
    if saved_names != names_here:
        raise CheckpointError(
            f"{source} holds the adapters {_describe(saved_names)}, but this model has {_describe(names_here)}: give "
            "the LoRA callback the same module and adapter_name. Nothing was loaded."
        )
    for entry, (_, root, injection) in zip(saved, here):
        there, here_too = _binding(LoraConfig.from_dict(entry["config"])), _binding(injection.config)
        different = [
            f"{name} ({there[name]!r} saved, {here_too[name]!r} here)"
            for name in there
            if there[name] != here_too[name]
        ]
        if different:
            raise CheckpointError(
                f"{source} was saved with other LoRA settings: {', '.join(different)}. The adapter would compute "
                "something else, so use the settings with which it was saved. Nothing was loaded."
            )
        if entry["base_fingerprint"] != fingerprint(root, injection):
            raise CheckpointError(
                f"{source} was trained on another base model: its fingerprint is {entry['base_fingerprint']}, this "
                f"model's is {fingerprint(root, injection)}. Build the model from the pretrained weights that the "
                "adapter was trained on; if this very model was merged before, unmerge it first. Nothing was loaded."
            )


def require_known_format(meta: Mapping[str, Any], source: str) -> None:
    """Require metadata that this version can read.

    Raises:
        CheckpointError: If a newer version wrote it.
    """
    if meta.get("format_version", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has format version {meta['format_version']}, and this version of lightning-lora reads up to "
            f"{FORMAT_VERSION}: update lightning-lora. Nothing was loaded."
        )


def fingerprint(root: nn.Module, injection: Injection) -> str:
    """A short number for the frozen base under an injection, computed once.

    It covers the name and shape of every frozen parameter and persistent buffer, and 16 values spread evenly over
    each, rounded to bfloat16: so a base is told from another at no cost to speak of, and stays the same base when a
    Trainer casts it to bfloat16.
    """
    if injection.fingerprint is None:
        settle(root)
        if any(tensor.is_meta for tensor in root.parameters()):
            return "unknown until the model is materialized"
        injection.fingerprint = fingerprint_of(base_tensors(root, injection))
    return injection.fingerprint


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of named tensors, of which only one is held at a time; see :func:`fingerprint`."""
    digest = hashlib.sha256()
    samples = []
    for name, shape, values in sorted((name, tuple(t.shape), _samples(t)) for name, t in tensors):
        digest.update(f"{name}{shape}".encode())
        samples.append(values)
    for values in samples:
        digest.update(values)
    return digest.hexdigest()[:16]


def _samples(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    if flat.is_meta or not flat.numel():
        return b""
    where = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[where.long().to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def base_tensors(root: nn.Module, injection: Injection) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters and persistent buffers under an injection, as they are when nothing is merged.

    Where processes share them, each is made whole as it comes.
    """
    unmerged: dict[str, Tensor] = {
        f"{name}.{parameter}".lstrip("."): base_weight
        for name, layer in adapted_layers(root, injection)
        for parameter, base_weight in layer._base_weights.items()
    }
    for each in injections_of(root):
        unmerged.update(each.whole)
        unmerged.update({} if each is injection else each.originals)  # what it trains is base to this one
    adapters = {id(p) for m in root.modules() if isinstance(m, LoraLayer) for p in m.lora.parameters()}
    for name, module, inner in tensors_of(root):
        if inner in module._parameters:
            if id(getattr(module, inner)) not in adapters and name not in injection.trained:
                yield name, _whole(module, inner, unmerged.get(name))
        elif not _is_saved(name, injection):
            yield name, whole(module, inner)


def _whole(module: nn.Module, name: str, tensor: Optional[Tensor]) -> Tensor:
    """A whole tensor, given what this process holds of it or, as before it was sharded, all."""
    if tensor is not None and tensor.shape == shape_of(module, name) and not isinstance(tensor, DTensor):
        return tensor
    return whole(module, name, tensor)


def _adapter_names(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield from (clean_name(f"{name}.lora.{inner}".lstrip(".")) for inner, _, _ in tensors_of(module.lora))
    for root_name, root, injection in injections(model):
        buffers = [clean_name(name) for name, _ in saved_buffers(root, injection)]
        trained = injection.trained if injection.in_place else {}
        yield from (f"{root_name}.{name}".lstrip(".") for name in [*trained, *buffers])


def saved_buffers(root: nn.Module, injection: Injection) -> list[tuple[str, Tensor]]:
    """The buffers of the modules that an injection trains in full."""
    return [(name, buffer) for name, buffer in root.named_buffers() if _is_saved(name, injection)]


def _is_saved(name: str, injection: Injection) -> bool:
    return any(is_inside(clean_name(name), saved) for saved in injection.saved)


def _binding(config: LoraConfig) -> dict[str, Any]:
    """The settings that change what given tensors compute."""
    start = (config.init_lora_weights, config.seed) if config.takes_from_base or config.use_vera else (True, 0)
    return {name: getattr(config, name) for name in _BINDING} | dict(zip(("init_lora_weights", "seed"), start))


def _identity(module: str, adapter_name: str, config: dict[str, Any]) -> tuple[str, str, str]:
    return module, adapter_name, str(config["target_modules"])


def _describe(names: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name!r} on {module or 'the whole module'}" for name, module in names) or "none"


def _shorten(names: Union[list[str], tuple[str, ...]], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
