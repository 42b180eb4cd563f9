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
from torch.distributed.fsdp._common_utils import TrainingState  # which the type of the public attribute is
from torch.distributed.fsdp._runtime_utils import _reshard as _free_full_values  # in torch 2.1 to 2.15
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_lora.fqn import base_modules, clean_fqn

# What errors say of what must be done to a model before its parameters are shared.
BEFORE_SHARDING = (
    "have configure_model call fully_shard in a method of the module that is named shard, before which the LoRA "
    "callback does its part; without a Trainer, call lightning_lora.inject first"
)
_MIXED = 1_000_000
_FLAT = ("_param_infos", "_shapes", "_shard_param_infos", "_shared_param_infos")


@dataclasses.dataclass(frozen=True)
class FlatShard:
    """Which slice of FSDP's flat parameter a parameter is.

    Attributes:
        shape: Of the full parameter.
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
_flat_shards: "weakref.WeakKeyDictionary[nn.Module, dict[str, FlatShard]]" = weakref.WeakKeyDictionary()
_units: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]" = weakref.WeakKeyDictionary()


def unwrap_fsdp(module: nn.Module) -> nn.Module:
    """The module itself, without FSDP around it."""
    return module.module if isinstance(module, FSDP) else module


def register_sharding(model: nn.Module) -> None:
    """Note how a strategy has sharded a model, and warn if it did so at great cost.

    Args:
        model: The whole of it, with what the strategy has put around it.
    """
    note_units(model)
    for unit in model.modules():
        if isinstance(unit, FSDP):
            _register_flat_shards(unit)


def note_units(model: nn.Module) -> None:
    """Note which FSDP unit each module is in, for a module itself does not know what is around it."""
    if not dist.is_initialized():
        return
    for unit in model.modules():  # outer ones first, so that each module is left with the innermost around it
        if isinstance(unit, (FSDP, FSDPModule)):
            _units.update((module, weakref.ref(unit)) for module in unit.modules())


def _register_flat_shards(unit: FSDP) -> None:
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
            f"made for torch 2.12 to 2.15, and this is {torch.__version__}. Use ModelParallelStrategy, or that version."
        )
    group, rank, world = unit.process_group, dist.get_rank(unit.process_group), dist.get_world_size(unit.process_group)
    device: Any = unit.compute_device
    numels = torch.tensor([shard.numel_in_shard or 0 for shard in flat._shard_param_infos], device=device)
    gathered = [torch.empty_like(numels) for _ in range(world)]
    dist.all_gather(gathered, numels, group=group)
    lengths = torch.stack(gathered, 1).tolist()
    by_owner = {}
    for info, shape, own in zip(flat._param_infos, flat._shapes, lengths):
        by_owner[info.module, info.param_name] = FlatShard(shape, own, rank, group, device)
    for shared in flat._shared_param_infos:
        by_owner[shared.module, shared.param_name] = by_owner[shared.prim_module, shared.prim_param_name]
    for (module, name), flat_shard in by_owner.items():
        _flat_shards.setdefault(module, {})[name] = flat_shard
    _warn_if_mixed([(getattr(module, name), flat_shard) for (module, name), flat_shard in by_owner.items()])


def _warn_if_mixed(parameters: list[tuple[nn.Parameter, FlatShard]]) -> None:
    frozen = sum(flat_shard.shape.numel() for parameter, flat_shard in parameters if not parameter.requires_grad)
    if frozen > _MIXED and any(parameter.requires_grad for parameter, _ in parameters):
        rank_zero_warn(
            f"FSDP keeps trained and {frozen:,} frozen numbers in one flat parameter, for all of which gradients are "
            "made and sent. FSDPStrategy(auto_wrap_policy={YourBlock}) lets LoRA keep the adapters apart; if you wrap "
            "the model yourself, use lora_auto_wrap_policy."
        )


def _reshard(modules: Iterable[nn.Module]) -> None:
    """Reshard the FSDP units around these modules that a forward pass left unsharded."""
    if not dist.is_initialized():
        return
    for unit in {id(unit): unit for module in modules if (unit := _unit_of(module)) is not None}.values():
        if isinstance(unit, FSDPModule):
            unit.reshard()
        elif isinstance(unit, FSDP) and _is_unsharded(unit):
            if unit.training_state is not TrainingState.IDLE:
                raise RuntimeError(
                    "FSDP has the parameters of a unit in use, as inside of training_step those of the outermost one "
                    "are, so they cannot be read, stored or exchanged now: do it outside of the forward pass, or let "
                    "auto_wrap_policy give their module a unit of its own."
                )
            # The public way, summon_full_params, keeps the full values of what was gathered before it, and the next
            # forward pass would compute with these, whatever becomes of the shards.
            _free_full_values(unit, unit._handle, True)


def _unit_of(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (FSDP, FSDPModule)):
        return module
    found = _units.get(module)
    return found() if found is not None else None


def _is_unsharded(unit: FSDP) -> bool:
    handle = unit._handle
    if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):  # not even initialized
        return False
    return not handle.needs_unshard()


def is_shard(module: nn.Module, name: str) -> bool:
    """Whether this process holds only a shard: a ``DTensor``, or a slice of an FSDP flat parameter.

    Args:
        module: The very module that has the parameter or buffer.
        name: Its name there.
    """
    return name in _flat_shards.get(module, ()) or isinstance(getattr(module, name), DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the parameters of a model."""
    # A look at every parameter would be slow where there is one process, and a batch may ask.
    return dist.is_initialized() and any(
        is_shard(module, name) for _, module in base_modules(model) for name, _ in module._parameters.items()
    )


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes what was gathered from a model: where processes share one, the first does for all."""
    return not is_sharded(model) or dist.get_rank() == 0


def full_shape(module: nn.Module, name: str) -> torch.Size:
    """The shape of a whole parameter or buffer; of a nested one, which has none, how many numbers it has."""
    flat_shard = _flat_shards.get(module, {}).get(name)
    if flat_shard is not None:
        return flat_shard.shape
    tensor: Tensor = getattr(module, name)
    return torch.Size([tensor.numel()]) if tensor.is_nested else tensor.shape


def named_tensors(model: nn.Module, of_base: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter and persistent buffer under each of its names: its clean name, its module and its name there.

    They are shards then, where processes share them, also after a forward pass that left units unsharded.

    Args:
        model: The model.
        of_base: Whether to leave out those of adapters.
    """
    _reshard(module for _, module in base_modules(model)) if of_base else _reshard(model.modules())
    modules = base_modules(model, False) if of_base else model.named_modules(remove_duplicate=False)
    for module_name, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield clean_fqn(f"{module_name}.{name}".lstrip(".")), module, name


@torch.no_grad()
def full_tensor(module: nn.Module, name: str, shard: Tensor | None = None) -> Tensor:
    """The full tensor.

    Args:
        module: The module that has the parameter or buffer.
        name: Its name there.
        shard: What this process holds of it, or of another tensor that is sharded like it. By default, its own.

    Returns:
        Its own tensor, if every process has the full one, else a new one.
    """
    _reshard([module])
    shard = (getattr(module, name) if shard is None else shard).detach()
    if isinstance(shard, DTensor):
        on_mesh: Any = shard.to(shard.device_mesh.device_type)  # from where it may be offloaded to
        return on_mesh.full_tensor()  # type: ignore[no-any-return]
    flat_shard = _flat_shards.get(module, {}).get(name)
    if flat_shard is None:
        return shard
    result = torch.empty(flat_shard.shape.numel(), dtype=shard.dtype, device=flat_shard.device)
    for rank, piece in enumerate(torch.split(result, flat_shard.lengths)):
        if piece.numel():
            if rank == flat_shard.rank:
                piece.copy_(shard.flatten())
            dist.broadcast(piece, dist.get_global_rank(flat_shard.group, rank), group=flat_shard.group)
    return result.view(flat_shard.shape)


def local_tensor(module: nn.Module, name: str) -> Tensor:
    """What this process holds of a parameter or buffer, whose name may be dotted, as an ordinary tensor."""
    module, name = _owner(module, name)
    _reshard([module])
    tensor: Tensor = getattr(module, name)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def shard_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded like a parameter.

    Args:
        module: The module that has the parameter or buffer.
        name: Its name there, which may be dotted.
        tensor: The full tensor; a shard of it is returned as it is.
    """
    module, name = _owner(module, name)
    like = getattr(module, name)
    if isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor):
        return _distribute(tensor, like)
    flat_shard = _flat_shards.get(module, {}).get(name)
    if flat_shard is None or tensor.shape != flat_shard.shape:
        return tensor
    return torch.split(tensor.flatten(), flat_shard.lengths)[flat_shard.rank].clone()


def _distribute(tensor: Tensor, like: DTensor) -> Tensor:
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements).to(like.device)


@torch.no_grad()
def copy_full_(destination: Tensor, tensor: Tensor) -> None:
    """Copy a full tensor into another; into a ``DTensor``, what this process holds of it."""
    destination.copy_(_distribute(tensor, destination) if isinstance(destination, DTensor) else tensor)


@torch.no_grad()
def load_full(module: nn.Module, name: str, tensor: Tensor, shard: Tensor | None = None) -> None:
    """Give a parameter or buffer, or what is sharded like it, the values of a full tensor; see :func:`full_tensor`."""
    _reshard([module])
    (getattr(module, name) if shard is None else shard).detach().copy_(shard_of(module, name, tensor))


@torch.inference_mode(False)  # in which what is cast here could never be trained again
@torch.no_grad()
def swap_parameters(module: nn.Module, name: str, other: Tensor) -> Tensor:
    """Put another parameter, or other values of it, in the place of a module's own.

    The other takes on dtype and device of what it replaces, for the model may have been cast or moved meanwhile.

    Args:
        module: The module.
        name: Name of the parameter or buffer, which may be dotted.
        other: An ``nn.Parameter`` is put in the place of the object that is there. Any other tensor, full or what this
            process holds of it, is only put under that object, so that all that hangs on it stays: hooks, attributes,
            ties, places in optimizers. Shards are always exchanged so, since the strategy keeps the objects.

    Returns:
        What was there, to be put back by this function.

    Raises:
        ValueError: If the other has no values, as it is on the meta device.
    """
    module, name = _owner(module, name)
    _reshard([module])
    here: Tensor = getattr(module, name)
    if other.is_meta and not here.is_meta:
        raise ValueError(
            f"The values of {name!r} in a {type(module).__name__} were put aside while it was on the meta device, so "
            "there are none to put back: load the weights before the adapter is injected. Nothing was changed."
        )
    if is_shard(module, name):
        before = here.detach().clone()
        here.detach().copy_(shard_of(module, name, other.detach()))
        return nn.Parameter(before, here.requires_grad) if isinstance(other, nn.Parameter) else before
    # Models are cast in their floating-point numbers alone, and moved as a whole.
    casts = other.is_floating_point() or other.is_complex()
    values = other.data.to(here.device, here.dtype if casts else other.dtype)
    if isinstance(other, nn.Parameter):
        other.data = values
        setattr(module, name, other)
        return here
    before = here.data
    here.data = values  # which neither makes a new object nor counts as a change of one that autograd has saved
    return before


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner_name, _, attribute = name.rpartition(".")
    return module.get_submodule(owner_name) if owner_name else module, attribute  # TorchScript's cannot be asked


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have modules show their own parameters in full meanwhile, to be read and not changed."""
    modules = list(modules)
    _reshard(modules)
    shown: list[tuple[nn.Module, str]] = []
    try:
        for module in modules:
            for name, parameter in list(module._parameters.items()):  # which resharding takes out and puts in again
                if parameter is not None and is_shard(module, name):
                    # An attribute of the object itself is found before the parameter, which so stays registered.
                    module.__dict__[name] = nn.Parameter(full_tensor(module, name), requires_grad=False)
                    shown.append((module, name))
        yield
    finally:
        for module, name in shown:
            del module.__dict__[name]
