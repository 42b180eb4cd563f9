"""Optimizer state: by names, and of parameters that processes share full in files, and sharded in memory."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.fqn import clean_fqn
from lightning_lora.sharding import full_shape, full_tensor, named_tensors, shard_of

_LIKE_PARAMETER = "like the parameter"
_LISTS = ("params", "param_names")  # what a group has one of for each parameter


def optimized_names(model: nn.Module, optimizers: Iterable[Any]) -> list[list[list[str]]]:
    """For each group of each optimizer, the names of its parameters, in the order by which torch knows them."""
    names = {id(parameter): clean_fqn(name) for name, parameter in model.named_parameters()}
    groups = [getattr(each, "param_groups", []) for each in optimizers]
    return [[[names.get(id(p), "") for p in group["params"]] for group in found] for found in groups]


def reordered(state_dict: dict[str, Any], saved: list[list[str]], here: list[list[str]]) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would have been if the parameters had been in another order.

    Parameters are in another order where callbacks stand in another, or modules are made in another.

    Args:
        state_dict: As it was saved.
        saved: The names of its parameters by group.
        here: Those that the optimizer has. If they are others, what was saved is given back as it is.
    """
    if (
        saved == here
        or any(len(set(names)) != len(names) for names in saved)
        or list(map(set, saved)) != list(map(set, here))
    ):
        return state_dict
    groups = [
        group | {key: [dict(zip(old, group[key]))[name] for name in new] for key in _LISTS if key in group}
        for group, old, new in zip(state_dict["param_groups"], saved, here)
    ]
    return {**state_dict, "param_groups": groups}


def gathered_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would be in one process, on the CPU. All processes must call this together.

    Raises:
        RuntimeError: If the optimizer keeps tensors of other shapes than the parameters', which cannot be made whole.
    """
    state_dict = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners = _owners(model)
    own = {
        index: {key: _describe(key, value, parameters[index], optimizer) for key, value in entries.items()}
        for index, entries in state_dict["state"].items()
    }
    # A process that holds nothing of a parameter has no state for it either.
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    described: dict[int, dict[str, Any]] = {}
    for theirs in everyone:
        for index, entries in theirs.items():
            described.setdefault(index, entries)
    state = {}
    for index in sorted(described):
        entries = state_dict["state"].get(index, {})
        state[index] = {
            key: _full(entries.get(key), parameters[index], value[1], owners) if _is_like(value) else value
            for key, value in described[index].items()
        }
    return {"state": state, "param_groups": state_dict["param_groups"]}


def shard_optimizer(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What this process holds of a whole ``optimizer.state_dict()``."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners = _owners(model)
    state = {}
    for index, entries in state_dict["state"].items():
        module, name = owners[id(parameters[index])]
        shape = full_shape(module, name)
        state[index] = {
            key: shard_of(module, name, value) if _is_of_shape(value, shape) else value
            for key, value in entries.items()
        }
    return {**state_dict, "state": state}


def _is_of_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    return {id(getattr(module, name)): (module, name) for _, module, name in named_tensors(model)}


def _describe(key: str, value: Any, parameter: nn.Parameter, optimizer: Optimizer) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value.cpu() if isinstance(value, Tensor) else value
    if value.shape != parameter.shape:
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps {key!r} in another shape ({tuple(value.shape)}) than its parameter's "
            f"({tuple(parameter.shape)}), which cannot be saved where processes share the parameters: use an optimizer "
            "such as AdamW, or ModelCheckpoint(save_weights_only=True)."
        )
    return _LIKE_PARAMETER, value.dtype


def _is_like(value: Any) -> bool:
    return isinstance(value, tuple) and value[0] == _LIKE_PARAMETER


def _full(
    part: Tensor | None, parameter: nn.Parameter, dtype: torch.dtype, owners: dict[int, tuple[nn.Module, str]]
) -> Tensor:
    part = torch.zeros_like(parameter, dtype=dtype) if part is None else part
    return full_tensor(*owners[id(parameter)], part).cpu()
