"""The state of adapters: collect it, say what it belongs to, check it, load it."""

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.fake_tensors import has_values
from lightning_lora.fqn import clean_fqn, listed
from lightning_lora.layers.seal import wraps_tensors
from lightning_lora.model.finite import DTYPES
from lightning_lora.model.record import adapted_layers, named_injections, roots_of
from lightning_lora.model.targets import modules_by_name
from lightning_lora.sharding import full_shape, full_tensor, is_sharded, load_full, named_tensors


class CheckpointError(RuntimeError):
    """Saved adapter state that cannot be used with this model. The model is left as it was."""


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors alone: every adapter, every parameter trained in full, buffers of ``modules_to_save``.

    Args:
        model: A model with adapters.

    Returns:
        The tensors under the names that ``model.state_dict()`` has for them, unless it is made to have others; no
        copies, unless processes share the model. Then all must call this together, and each gets the whole tensors.
    """
    owners = _owners(model)
    return gathered(model, owners.adapters) if is_sharded(model) else owners.adapters_in(model.state_dict())


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load what :func:`adapter_state_dict` gave, in place.

    Raises:
        CheckpointError: If a tensor is missing, left over or of another shape. Nothing is loaded then.
    """
    check_adapters(model, state_dict, "the state dict", alone=True)
    scatter(model, state_dict)


def load_saved(model: nn.Module, state_dict: Mapping[str, Any], load: Callable[[dict[str, Any]], Any]) -> None:
    """Load what :func:`adapter_only` left, which must have been checked.

    Args:
        model: A model with adapters.
        state_dict: Entries by name.
        load: Loads what is outside of where adapters were injected, such as ``model.load_state_dict``. It may be as
            strict as it likes: what no file has is not found missing.
    """
    owners = _owners(model)
    outside = {name: value for name, value in state_dict.items() if clean_fqn(name) not in owners.adapters}
    if outside or not any(name == "" for name, _ in named_injections(model)):
        with _base_absent(model):
            load(outside)
    scatter(model, state_dict)


def trained_only(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave of a state dict of ``model`` the parameters that adapters train, whose values must be finite."""
    owners = _owners(model).adapters
    trained = {name for name, (module, inner) in owners.items() if module._parameters.get(inner) is not None}
    return {name: value for name, value in state_dict.items() if clean_fqn(name) in trained}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The names of :func:`adapter_state_dict`, and tensors of these shapes, without gathering anything."""
    return _owners(model).adapters_in(_tensors(model))


def tensor_names(model: nn.Module) -> list[str]:
    """The names of a model's state dict, without gathering anything."""
    return list(_tensors(model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    if not is_sharded(model):
        return model.state_dict()
    return {name: torch.empty(full_shape(module, inner), device="meta") for name, module, inner in named_tensors(model)}


def gathered(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Whole tensors of a model that processes share, one after the other, so that only these are ever whole."""
    return {name: full_tensor(module, inner) for name, module, inner in named_tensors(model) if name in names}


def scatter(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load whole tensors by their names, each process what it holds of them."""
    found = {clean_fqn(name): tensor for name, tensor in state_dict.items()}
    for name, module, inner in named_tensors(model):
        if name in found:
            load_full(module, inner, found[name])


def adapter_only(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a full state dict of ``model`` what the adapters' injections hold frozen."""
    return _owners(model).kept_in(state_dict)


def adapter_whole(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with all adapters under names that ``model`` has for them.

    A state dict may have other names, by hooks of the model or where its methods are overridden.
    """
    owners = _owners(model)
    return {**owners.adapters_in(state_dict), **owners.kept_in(state_dict)}


def saved_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of the clean names of a model's tensors are those of adapters, or outside of where they were injected."""
    owners = _owners(model)
    return [name for name in names if owners.keep(name)]


@contextmanager
def _base_absent(model: nn.Module) -> Iterator[None]:
    """Have ``model.load_state_dict`` be as strict as it is asked to, but for the frozen base, which no file has."""
    owners = _owners(model)

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if not owners.inside(clean_fqn(name))]

    handle = model.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


@dataclasses.dataclass(frozen=True)
class _Owners:
    """To whom the entries of a model's state dict belong, by what they are: a tensor or module may have many names.

    Attributes:
        adapters: The tensors of adapters and those trained in full, by each of their clean names: module, name there.
        base: The other names of tensors that belong to where adapters were injected.
        modules: The names of all modules there.
        whole: The names of those of them that are trained in full.
        places: Where all these tensors lie in memory, by which they are known under other names.
    """

    adapters: dict[str, tuple[nn.Module, str]]
    base: set[str]
    modules: set[str]
    whole: set[str]
    places: set[tuple[Any, ...]]

    def inside(self, name: str) -> bool:
        """Whether an entry belongs to where adapters were injected."""
        return name in self.adapters or name in self.base or any(parent in self.modules for parent in _parents(name))

    def adapters_in(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The adapters' entries in a state dict, and of those that it has under none of these names their tensors."""
        found = {name: value for name, value in state_dict.items() if clean_fqn(name) in self.adapters}
        tensors = {name: getattr(*self.adapters[name]).detach() for name in self.adapters}
        there = {place_of(tensors[clean_fqn(name)]) for name in found}
        return found | {name: tensor for name, tensor in tensors.items() if place_of(tensor) not in there}

    def kept_in(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of a state dict."""
        return {name: value for name, value in state_dict.items() if self.keep(clean_fqn(name), value)}

    def keep(self, name: str, value: Any = None) -> bool:
        """Whether a checkpoint holds an entry. What modules store beside tensors goes by the module."""
        if name in self.adapters:
            return True
        if not self.inside(name):
            return not isinstance(value, Tensor) or place_of(value) not in self.places
        return name not in self.base and any(parent in self.whole for parent in _parents(name))


def place_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where a tensor's values are in memory, ``None`` if that cannot be told."""
    if tensor.is_nested or tensor.layout is not torch.strided or wraps_tensors(tensor):
        return None
    return (tensor.device, tensor.data_ptr(), tensor.shape) if tensor.numel() and has_values(tensor) else None


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


class _Steady(threading.local):
    """What was found of models in which no adapter comes or goes for now, by their identity."""

    def __init__(self) -> None:
        self.found: dict[int, _Owners | None] = {}


_steady = _Steady()


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Look through a model once for all that is asked of it in this block, in which no adapter comes, goes or moves."""
    if id(model) in _steady.found:
        yield
        return
    _steady.found[id(model)] = None
    try:
        yield
    finally:
        del _steady.found[id(model)]


def _owners(model: nn.Module) -> _Owners:
    owners = _steady.found.get(id(model)) or _find_owners(model)
    if id(model) in _steady.found:
        _steady.found[id(model)] = owners
    return owners


def _find_owners(model: nn.Module) -> _Owners:
    found = [injection for _, injection in named_injections(model)]
    layers = adapted_layers(model)
    adapter = [getattr(module, inner) for layer in layers for _, module, inner in named_tensors(layer.lora)]
    adapter += [tensor for injection in found for tensor in injection.tensors(injection.own_names()).values()]
    roots = roots_of(found)
    modules = {id(module) for root in roots for module in root.modules()}
    whole = {
        id(module)
        for injection in found
        if injection.in_place and injection.saved
        for name, saved in modules_by_name(injection.root).items()
        if injection.saves(name)
        for module in saved.modules()
    }
    # What is tied to the base stays the base's, also where a merge has put another in its place.
    holders: list[Mapping[str, Any]] = [
        *(layer._aside for layer in layers),
        *(injection.aside for injection in found),
        *(module._parameters for root in roots for module in root.modules()),
        *(module._buffers for root in roots for module in root.modules()),
    ]
    base = [tensor for holder in holders for tensor in holder.values() if isinstance(tensor, Tensor)]
    adapter_ids, base_ids = set(map(id, adapter)), set(map(id, base))
    places = set() if is_sharded(model) else {place for each in (*adapter, *base) if (place := place_of(each))}
    owners = _Owners({}, set(), set(), set(), places)
    for name, module, inner in named_tensors(model):
        if id(getattr(module, inner)) in adapter_ids:
            owners.adapters[name] = (module, inner)
        elif id(getattr(module, inner)) in base_ids:
            owners.base.add(name)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in modules:
            owners.modules.add(clean_fqn(name))
        if id(module) in whole:
            owners.whole.add(clean_fqn(name))
    return owners


def check_adapters(model: nn.Module, found: Mapping[str, Any], source: str, alone: bool = False) -> None:
    """Require the adapters of a model, each under one of its names at least, and nothing else that it holds frozen.

    Args:
        model: The model.
        found: Entries of a state dict by name.
        source: Where they come from.
        alone: Whether nothing else may be there either.

    Raises:
        CheckpointError: Naming what differs.
    """
    owners = _owners(model)
    there = {clean_fqn(name): value for name, value in found.items()}
    names: dict[int, list[str]] = {}
    for name, (module, inner) in owners.adapters.items():
        names.setdefault(id(getattr(module, inner)), []).append(name)
    missing = {same[0] for same in names.values() if not any(name in there for name in same)}
    unexpected = {name for name in there if name not in owners.adapters and (alone or not owners.keep(name))}
    like = {
        name: torch.empty(full_shape(module, inner), dtype=getattr(module, inner).dtype, device="meta")
        for name, (module, inner) in owners.adapters.items()
        if name in there
    }
    _require_none(missing, unexpected, _unlike(like, there), source)


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Any], source: str) -> None:
    """Require the same names and shapes.

    Raises:
        CheckpointError: Naming what differs.
    """
    there = {name: tensor for name, tensor in expected.items() if name in found}
    _require_none(expected.keys() - found.keys(), found.keys() - expected.keys(), _unlike(there, found), source)


def _unlike(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> dict[str, list[str]]:
    """By what they differ in, the names of tensors that cannot be put in the place of those expected, and why."""
    unlike: dict[str, list[str]] = {"of another shape": [], "of another type": []}
    for name, tensor in expected.items():
        other = found[name]
        if not isinstance(other, Tensor):
            unlike["of another type"].append(f"{name} (a {type(other).__name__} found)")
        elif other.shape != tensor.shape:
            unlike["of another shape"].append(f"{name} ({tuple(other.shape)} found, {tuple(tensor.shape)} expected)")
        elif other.layout is not torch.strided or other.is_meta:
            unlike["of another type"].append(f"{name} (a tensor that is sparse or without values found)")
        elif other.dtype != tensor.dtype and not (other.dtype in DTYPES and tensor.is_floating_point()):
            unlike["of another type"].append(f"{name} ({other.dtype} found, {tensor.dtype} expected)")
    return unlike


def _require_none(
    missing: Iterable[str], unexpected: Iterable[str], unlike: Mapping[str, Iterable[str]], source: str
) -> None:
    every = {"missing": missing, "left over": unexpected, **unlike}
    problems = [f"{what}: {listed(sorted(names))}" for what, names in every.items() if names]
    if problems:
        raise CheckpointError(
            f"The tensors in {source} do not fit the adapters of this model. {'; '.join(problems)}. Use the LoRA "
            "settings (r, target_modules, modules_to_save, ...) with which it was saved. Nothing was loaded."
        )
