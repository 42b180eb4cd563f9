"""Parameters of which each process holds a part: those of FSDP, of FSDP2 and of tensor parallelism.

A shard is a ``DTensor`` under FSDP2 and tensor parallelism. Under FSDP it is a slice of the unit's flat parameter, an
ordinary tensor of one dimension, so :func:`register_sharding` notes what it is a slice of. Here full tensors are made
of shards, one parameter at a time, and full tensors cut into shards again. All processes must call these functions
together.
"""

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_lora.fqn import clean_fqn

_MIXED = 1_000_000
_FLAT = ("_param_infos", "_shapes", "_shard_param_infos", "_shared_param_infos")


@dataclasses.dataclass(frozen=True)
class FlatShard:
    """How a parameter is cut up by FSDP.

    Attributes:
        shape: Of the whole parameter.
        lengths: How many of its numbers each process of the group holds, in the order of their ranks.
        rank: Of this process in the group.
        group: The processes over which it is sharded.
        device: Where they compute, and so communicate.
    """

    shape: torch.Size
    lengths: list[int]
    rank: int
    group: Any
    device: torch.device


# Kept here and not on the modules, so that a copied or pickled model carries no process groups.
_stretches: "weakref.WeakKeyDictionary[nn.Module, dict[str, FlatShard]]" = weakref.WeakKeyDictionary()
_units: "weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]]" = weakref.WeakKeyDictionary()


def unwrap_fsdp(module: nn.Module) -> nn.Module:
    """The module itself, without FSDP around it."""
    return module.module if isinstance(module, FSDP) else module


def register_sharding(model: nn.Module) -> None:
    """Note how a strategy has sharded a model, and warn if it did so at great cost.

    Args:
        model: The whole of it, with what the strategy has put around it.
    """
    for unit in model.modules():
        if isinstance(unit, (FSDP, FSDPModule)):
            for module in unit.modules():
                units = _units.setdefault(module, [])
                if all(known() is not unit for known in units):
                    units.append(weakref.ref(unit))
        if isinstance(unit, FSDP):
            _note_stretches(unit)


def _note_stretches(unit: FSDP) -> None:
    # torch 2.13 says in private attributes alone how a flat parameter is cut up; there they are since 2.1.
    handle = unit._handle
    if handle is None:
        return
    if not unit._use_orig_params:
        raise ValueError(
            "LoRA needs FSDP with use_orig_params=True, which is what FSDPStrategy sets by itself: leave it out."
        )
    if not handle.uses_sharded_strategy:
        raise ValueError(
            'FSDP shards nothing here, since its strategy is NO_SHARD or there is one process: use strategy="ddp", or '
            "one device."
        )
    flat = handle.flat_param
    absent = [name for name in _FLAT if not hasattr(flat, name)]
    if absent:
        raise RuntimeError(
            f"FSDP's flat parameters have no {', '.join(absent)}, which say how they are cut up: lightning-lora was "
            f"made for torch 2.6 to 2.13, and this is {torch.__version__}. Use ModelParallelStrategy, or that version."
        )
    group, rank, world = unit.process_group, dist.get_rank(unit.process_group), dist.get_world_size(unit.process_group)
    device: Any = unit.compute_device
    numels = torch.tensor([shard.numel_in_shard or 0 for shard in flat._shard_param_infos], device=device)
    gathered = [torch.empty_like(numels) for _ in range(world)]
    dist.all_gather(gathered, numels, group=group)
    lengths = torch.stack(gathered, 1).tolist()
    by_owner = {}
    for info, shape, cut in zip(flat._param_infos, flat._shapes, lengths):
        by_owner[info.module, info.param_name] = FlatShard(shape, cut, rank, group, device)
    for shared in flat._shared_param_infos:
        by_owner[shared.module, shared.param_name] = by_owner[shared.prim_module, shared.prim_param_name]
    for (module, name), stretch in by_owner.items():
        _stretches.setdefault(module, {})[name] = stretch
    _warn_if_mixed([(getattr(module, name), stretch) for (module, name), stretch in by_owner.items()])


def _warn_if_mixed(parameters: list[tuple[nn.Parameter, FlatShard]]) -> None:
    frozen = sum(stretch.shape.numel() for parameter, stretch in parameters if not parameter.requires_grad)
    if frozen > _MIXED and any(parameter.requires_grad for parameter, _ in parameters):
        rank_zero_warn(
            f"FSDP keeps trained and {frozen:,} frozen numbers in one flat parameter, for all of which gradients are "
            "made and sent. FSDPStrategy(auto_wrap_policy={YourBlock}) lets LoRA keep the adapters apart; if you wrap "
            "the model yourself, use lora_auto_wrap_policy."
        )


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass has left whole, so that every process holds its parts alone."""
    found = {id(unit): unit for module in model.modules() for ref in _units.get(module, ()) if (unit := ref())}
    found |= {id(module): module for module in model.modules() if isinstance(module, FSDPModule)}
    for unit in found.values():
        if isinstance(unit, FSDPModule):
            unit.reshard()
        elif isinstance(unit, FSDP) and _is_whole(unit):
            # There is no public way but to gather it, which it is, and let go of it.
            with FSDP.summon_full_params(unit, recurse=False, writeback=False):
                pass


def _is_whole(unit: FSDP) -> bool:
    handle = unit._handle
    if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):  # not even initialized
        return False
    return not handle.needs_unshard()


def is_shard(module: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer of this very module is cut up, or is a stretch of a flat parameter."""
    return name in _stretches.get(module, ()) or isinstance(getattr(module, name), DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the parameters of a model."""
    # A look at every parameter would be slow where there is one process, and a batch may ask.
    return dist.is_initialized() and any(
        is_shard(module, name) for module in model.modules() for name in module._parameters
    )


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes what was gathered from a model: where processes share one, the first does for all."""
    return not is_sharded(model) or dist.get_rank() == 0


def full_shape(module: nn.Module, name: str) -> torch.Size:
    """The shape of a whole parameter."""
    stretch = _stretches.get(module, {}).get(name)
    return getattr(module, name).shape if stretch is None else stretch.shape


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter and persistent buffer under each of its names: its clean name, its module and its name there."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield clean_fqn(f"{module_name}.{name}".lstrip(".")), module, name


@torch.no_grad()
def full_tensor(module: nn.Module, name: str, part: Tensor | None = None) -> Tensor:
    """A whole tensor.

    Args:
        module: The module that has the parameter or buffer.
        name: Its name there.
        part: What this process holds of it, or of another tensor that is cut up like it. By default, its own.

    Returns:
        Its own tensor, if every process has it whole, else a new one.
    """
    part = (getattr(module, name) if part is None else part).detach()
    if isinstance(part, DTensor):
        on_mesh: Any = part.to(part.device_mesh.device_type)  # from where it may be offloaded to
        return on_mesh.full_tensor()  # type: ignore[no-any-return]
    stretch = _stretches.get(module, {}).get(name)
    if stretch is None:
        return part
    result = torch.empty(stretch.shape.numel(), dtype=part.dtype, device=stretch.device)
    for rank, piece in enumerate(torch.split(result, stretch.lengths)):
        if piece.numel():
            if rank == stretch.rank:
                piece.copy_(part.flatten())
            dist.broadcast(piece, dist.get_global_rank(stretch.group, rank), group=stretch.group)
    return result.view(stretch.shape)


@torch.no_grad()
def shard_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is cut up like a parameter, whose name may be dotted."""
    module, name = _owner(module, name)
    like = getattr(module, name)
    if isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor):
        return _distribute(tensor, like)
    stretch = _stretches.get(module, {}).get(name)
    if stretch is None:
        return tensor
    return torch.split(tensor.flatten(), stretch.lengths)[stretch.rank].clone()


def _distribute(tensor: Tensor, like: DTensor) -> Tensor:
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements).to(like.device)


@torch.no_grad()
def copy_full_(destination: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into one of a kind; into a ``DTensor``, what this process holds of it."""
    destination.copy_(_distribute(tensor, destination) if isinstance(destination, DTensor) else tensor)


@torch.no_grad()
def load_full(module: nn.Module, name: str, tensor: Tensor, part: Tensor | None = None) -> None:
    """Give a parameter or buffer, or what is cut up like it, the values of a whole tensor; see :func:`full_tensor`."""
    (getattr(module, name) if part is None else part).detach().copy_(shard_of(module, name, tensor))


@torch.no_grad()
def swap_parameters(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Put a parameter, or what this process holds of it, in the place of another, whose name may be dotted.

    Returns:
        What was there: the very object, or a copy of it if a strategy keeps that and so must find the new values in it.
    """
    module, name = _owner(module, name)
    before: nn.Parameter = getattr(module, name)
    if not is_shard(module, name):
        setattr(module, name, parameter)
        return before
    kept = nn.Parameter(before.detach().clone(), requires_grad=before.requires_grad)
    before.detach().copy_(parameter)
    return kept


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner_name, _, attribute = name.rpartition(".")
    return module.get_submodule(owner_name), attribute


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have modules show their own parameters whole meanwhile, to be read and not changed."""
    shown: list[tuple[nn.Module, str]] = []
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and is_shard(module, name):
                    # An attribute of the object itself is found before the parameter, which so stays registered.
                    module.__dict__[name] = nn.Parameter(full_tensor(module, name), requires_grad=False)
                    shown.append((module, name))
        yield
    finally:
        for module, name in shown:
            del module.__dict__[name]
