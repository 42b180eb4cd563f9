"""Adapters in a model that is sharded already, as ``ModelParallelStrategy`` has users do in ``configure_model``.

An adapter must be sharded as its layer is: under ``fully_shard`` as a group of its own over the same processes, under
tensor parallelism with A or B sharded along the dimension that the weight is sharded along.
"""

import warnings
from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import base_modules
from lightning_lora.layers import LoraLayer, Target, adapter_class_for
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.model.targets import TargetError
from lightning_lora.sharding import BEFORE_SHARDING, is_sharded, register_sharding

_TENSOR_PARALLEL = ("tensor_parallel", "tp")


def require_shardable(model: nn.Module, config: LoraConfig, targets: Iterable[Target]) -> None:
    """Require that adapters can be put in at this point, before any is.

    Raises:
        TargetError: If the model is sharded in a way that they cannot follow.
    """
    if any(isinstance(module, FSDP) for _, module in base_modules(model)):
        raise TargetError(
            "The model is wrapped in FullyShardedDataParallel, whose flat parameters no adapter can join: inject "
            "before it is wrapped, or leave the wrapping to FSDPStrategy. Nothing was changed."
        )
    if not is_sharded(model):
        return
    owners = _owners(model)
    for target in targets:
        weight = target.module._parameters.get("weight")
        adapter_class = adapter_class_for(target.layer_class, config)
        assert adapter_class is not None
        of_values = adapter_class.reads_weight or config.takes_from_base
        if isinstance(weight, DTensor) and _tensor_parallel_dims(weight, target.module in owners):
            if not adapter_class.follows_tensor_parallel or config.takes_from_base:
                raise TargetError(
                    f"{target.name} is cut up by tensor parallelism, where only a plain LoRA on nn.Linear can follow: "
                    "leave it out by exclude_modules, or use FSDP2 alone. Nothing was changed."
                )
        elif target.module in owners and (of_values or not adapter_class.is_called):
            problem = "starts at values of the whole weight" if of_values else "is read and never called"
            raise TargetError(
                f"{target.name} is sharded already, and its adapter {problem}: {BEFORE_SHARDING}. Nothing was changed."
            )


def shard_adapters(model: nn.Module, layers: Iterable[LoraLayer], adapter_name: str) -> None:
    """Share fresh adapters among the processes as their layers are."""
    owners = _owners(model)
    if not owners and not is_sharded(model):
        return
    for layer in layers:
        adapter = layer.lora[adapter_name]
        weight = layer._parameters.get("weight")
        if not isinstance(weight, DTensor):
            continue
        sharded = layer in owners
        dims = _tensor_parallel_dims(weight, sharded)
        if dims:
            assert isinstance(adapter, LinearAdapter)
            _distribute(adapter, *_along(weight, dims))
        if sharded:
            # It does, and nothing is done to that in place.
            warnings.filterwarnings("ignore", f".*{type(adapter).__name__}.* returned a view tensor")
            fully_shard(adapter, mesh=_sharding_mesh(weight.device_mesh, dims))
    register_sharding(model)


def _owners(model: nn.Module) -> set[nn.Module]:
    """All modules under ``fully_shard``."""
    return {inner for _, module in base_modules(model) if isinstance(module, FSDPModule) for inner in module.modules()}


def _tensor_parallel_dims(weight: DTensor, sharded: bool) -> list[int]:
    """The dimensions of the mesh over which a weight is cut up within a layer, not merely for storage."""
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if not sharded:
        return list(range(mesh.ndim))
    return [dim for dim, name in enumerate(names) if name in _TENSOR_PARALLEL]


def _sharding_mesh(mesh: DeviceMesh, tensor_parallel: list[int]) -> DeviceMesh:
    names = [name for dim, name in enumerate(mesh.mesh_dim_names or ()) if dim not in tensor_parallel]
    return mesh[tuple(names)] if tensor_parallel else mesh


def _along(weight: DTensor, dims: list[int]) -> tuple[DeviceMesh, list[Placement]]:
    mesh = weight.device_mesh
    names = tuple((mesh.mesh_dim_names or ())[dim] for dim in dims)
    return (mesh if len(dims) == mesh.ndim else mesh[names]), [weight.placements[dim] for dim in dims]


def _distribute(adapter: LinearAdapter, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Cut up B as the weight's outputs are, and A as its inputs are."""
    for attribute, dim in (("lora_A", 1 - adapter.out_dim), ("lora_B", adapter.out_dim)):
        own = [
            Shard(1 if attribute == "lora_A" else 0) if placement.is_shard(dim) else Replicate()
            for placement in placements
        ]
        parameter = adapter.get_parameter(attribute)
        setattr(
            adapter,
            attribute,
            nn.Parameter(distribute_tensor(parameter.detach(), mesh, own), requires_grad=parameter.requires_grad),
        )
