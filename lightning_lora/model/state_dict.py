"""The state of adapters: collect it, say what it belongs to, check it, load it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.fqn import clean_fqn
from lightning_lora.layers import LoraLayer
from lightning_lora.model.record import Injection, named_injections
from lightning_lora.sharding import full_shape, full_tensor, is_sharded, load_full, named_tensors


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
    return {name: tensor for name, tensor in model.state_dict().items() if clean_fqn(name) in names}


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
    return {name: tensor for name, tensor in _tensors(model).items() if clean_fqn(name) in names}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The names of what a checkpoint of a model holds, and tensors of these shapes."""
    return adapter_only(model, _tensors(model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    if not is_sharded(model):
        return model.state_dict()
    return {name: torch.empty(full_shape(module, inner), device="meta") for name, module, inner in named_tensors(model)}


def gathered(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Whole tensors of a model that processes share, one after the other, so that only these are ever whole."""
    return {name: full_tensor(module, inner) for name, module, inner in named_tensors(model) if name in names}


def scatter(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load whole tensors, by their clean names, into a model that processes share."""
    for name, module, inner in named_tensors(model):
        if name in state_dict:
            load_full(module, inner, state_dict[name])


def adapter_only(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a full state dict of ``model`` what the adapters' injections hold frozen."""
    kept = set(saved_names(model, map(clean_fqn, state_dict)))
    return {name: value for name, value in state_dict.items() if clean_fqn(name) in kept}


def saved_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of the clean names of a model's tensors are those of adapters, or outside of where they were injected."""
    adapter = set(_adapter_names(model))
    roots = [f"{name}." if name else "" for name, _ in named_injections(model)]
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


def _adapter_names(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield from (clean_fqn(f"{name}.lora.{inner}".lstrip(".")) for inner, _, _ in named_tensors(module.lora))
    for root_name, injection in named_injections(model):
        yield from (f"{root_name}.{name}".lstrip(".") for name in own_names(injection))


def own_names(injection: Injection) -> list[str]:
    """The names, in its root, of the parameters and buffers that an injection trains in full, if they are in place."""
    if not injection.in_place:
        return []
    return [
        *injection.trained,
        *(name for name in injection.aside if injection.saves(name) and name not in injection.trained),
    ]


def _shorten(names: list[str] | tuple[str, ...], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
