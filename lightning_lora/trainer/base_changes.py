"""The frozen base must stand: what would train it is refused, and what moves it nevertheless is found and named."""

import dataclasses
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.class_names import is_a
from lightning_lora.fake_tensors import has_values
from lightning_lora.fqn import base_modules, clean_fqn, is_submodule, listed
from lightning_lora.layers.seal import checksum, checksum_of, words, writes
from lightning_lora.model.record import base_parameters, named_injections
from lightning_lora.model.state_dict import saved_names
from lightning_lora.sharding import is_sharded, local_tensor, named_tensors
from lightning_lora.trainer.frozen_parameters import held_by, nested

_SAMPLES = 16
_WAYS_OUT = (
    "Name the modules in LoRA(modules_to_save=[...]), which trains and saves them in full, or adapt a part of the "
    "model alone with LoRA(module=...), which leaves the rest to train as without LoRA, or leave out the unfreezing."
)


def require_no_unfreezing(trainer: Any, module: str | None) -> None:
    """Require that none of Lightning's callbacks unfreezes the base later.

    Args:
        trainer: The Trainer with its callbacks.
        module: What is adapted, if it is not the whole. Then such callbacks may be there for the rest, unless theirs is
            known to be the same.

    Raises:
        ValueError: If one does.
    """
    for callback in trainer.callbacks:
        theirs = "backbone" if is_a(callback, "BackboneFinetuning") else None
        apart = module and (theirs is None or not (is_submodule(module, theirs) or is_submodule(theirs, module)))
        if is_a(callback, "BaseFinetuning") and not apart:
            raise ValueError(
                f"{type(callback).__name__} unfreezes parts of the base during fit, but no checkpoint would hold what "
                f"is learned in them. {_WAYS_OUT}"
            )


def require_frozen(optimizers: Iterable[Any], model: nn.Module) -> None:
    """Require that optimizers hold nothing of the base that requires gradients again.

    Raises:
        ValueError: If one does.
    """
    held = {id(p) for optimizer in optimizers for each in nested(optimizer) for p in held_by(each)}
    roots = [f"{name}." if name else "" for name, _ in named_injections(model)]
    found = [
        clean_fqn(name)
        for name, parameter in base_parameters(model)
        if parameter.requires_grad and id(parameter) in held and any(clean_fqn(name).startswith(r) for r in roots)
    ]
    if found:
        raise ValueError(
            f"Parameters of the frozen base require gradients again and are in an optimizer, but no checkpoint would "
            f"hold what is learned in them: {listed(list(map(repr, found)))}. {_WAYS_OUT}"
        )


@dataclasses.dataclass
class _Noted:
    """What is known of a tensor: its type and shape, how often and where it was written, 16 words, and their sum."""

    form: tuple[torch.dtype, torch.Size]
    written: tuple[int, int]
    sample: list[int]
    total: int


class BaseWatch:
    """Notes the frozen base when training starts, and finds what has moved since.

    torch counts the writes to a tensor, so that only what was written to is read again. Writes through ``.data`` are
    not counted: a few values spread over every tensor are looked at each time, and all of them at the end. Tensors that
    were not there, or empty, have moved too, and so have those that are gone. Where processes share the model, each
    looks at its shards, and all of them together say what has moved.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        self._model = model
        self._optimizers = list(optimizers)
        self._sizes = self._group_sizes()
        self._named: set[str] = set()
        tensors = dict(_base_tensors(model))
        samples, totals = _read(tensors, _sample), _read(tensors, _total)
        self._noted = {
            name: _Noted(_form(tensors[name]), _written(tensors[name]), samples[name], total)
            for name, (total,) in totals.items()
        }
        self._filled = _filled(model)
        self._extra = _extra_states(model)

    def require_frozen(self) -> None:
        """Require, if optimizers have other groups than before, that nothing of the base is in them."""
        sizes = self._group_sizes()
        if sizes != self._sizes:
            self._sizes = sizes
            require_frozen(self._optimizers, self._model)

    def moved(self, thoroughly: bool = False) -> list[str]:
        """The names of tensors whose values are not those noted, here or elsewhere; thoroughly, of every value."""
        every = dict(_base_tensors(self._model))
        come = every.keys() - self._filled
        gone = self._noted.keys() - _filled(self._model)
        tensors = {name: tensor for name, tensor in every.items() if name in self._noted}
        samples = _read(tensors, _sample)
        seen = {name: (_form(tensors[name]), sample) for name, sample in samples.items()}
        found = [name for name, each in seen.items() if each != (self._noted[name].form, self._noted[name].sample)]
        unsure = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in found and (thoroughly or _written(tensor) != self._noted[name].written)
        }
        for name, (total,) in _read(unsure, _total).items():
            if total != self._noted[name].total:
                found.append(name)
            else:
                self._noted[name].written = _written(unsure[name])
        found = [name for name in (*every, *sorted(gone)) if name in {*found, *come, *gone}]
        if not is_sharded(self._model):
            return found
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return list(dict.fromkeys(name for each in everyone for name in each))

    def warn_of_moved(self, thoroughly: bool = False) -> list[str]:
        """Name what has moved, once for each, and return the tensors among it."""
        found = self.moved(thoroughly)
        extra = _extra_states(self._model)
        moved = found + [name for name in extra if extra[name] != self._extra.get(name)]
        new = [name for name in moved if name not in self._named]
        self._named.update(moved)
        if new:
            rank_zero_warn(
                f"The frozen base has changed since training started, and no checkpoint holds the change, so they give "
                f"another model on the base than this one: {listed(list(map(repr, new)))}. If a training step changes "
                "them in place, as running statistics, codebooks and momentum teachers are, name them or their modules "
                "in LoRA(modules_to_save=[...]), or adapt a part alone with LoRA(module=...). If pretrained weights "
                "were loaded late, or buffers registered or filled, do so before fit or in configure_model."
            )
        return found

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for optimizer in self._optimizers for group in optimizer.param_groups]


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters and persistent buffers of which no checkpoint holds anything."""
    tensors = {name: local_tensor(module, inner) for name, module, inner in named_tensors(model)}
    saved = set(saved_names(model, tensors))
    yield from ((name, t) for name, t in tensors.items() if name not in saved and has_values(t) and t.numel())


def _filled(model: nn.Module) -> set[str]:
    """The names of all tensors of a model that are not empty, at least as far as they are here."""
    every = ((name, local_tensor(module, inner)) for name, module, inner in named_tensors(model))
    return {name for name, tensor in every if tensor.numel()}


def _extra_states(model: nn.Module) -> dict[str, Any]:
    """What modules store beside tensors of which no checkpoint holds anything, as what is equal if it is the same."""
    modules = ((name, m) for name, m in base_modules(model) if type(m).get_extra_state is not nn.Module.get_extra_state)
    states = {clean_fqn(f"{name}._extra_state".lstrip(".")): module for name, module in modules}
    saved = set(saved_names(model, states)) if states else set()
    return {name: _comparable(module.get_extra_state()) for name, module in states.items() if name not in saved}


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.shape, checksum(value)
    if isinstance(value, Mapping):
        return dict, [(key, _comparable(inner)) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [_comparable(inner) for inner in value]
    try:
        return pickle.dumps(value)
    except Exception:  # of whatever kind an object raises that cannot be stored
        return type(value)


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _written(tensor: Tensor) -> tuple[int, int]:
    return writes(tensor), tensor.data_ptr()


@torch.no_grad()
def _read(tensors: dict[str, Tensor], look: Any) -> dict[str, list[int]]:
    """What a look gives for each tensor that can be read, with one transfer for each device."""
    looks: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        try:
            looks[name] = look(*words(tensor))
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # such as quantized classes of tensors, of which the bytes cannot be seen
    found: dict[str, list[int]] = {}
    for device in {seen.device for seen in looks.values()}:
        here = {name: seen for name, seen in looks.items() if seen.device == device}
        values = iter(torch.cat(list(here.values())).tolist())
        found.update({name: [next(values) for _ in range(len(seen))] for name, seen in here.items()})
    return found


def _sample(eights: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([eights[:: max(1, len(eights) // _SAMPLES)][: _SAMPLES + 1], rest])


def _total(eights: Tensor, rest: Tensor) -> Tensor:
    return checksum_of(eights, rest).view(1)
