"""Sharding of a model's parameters over processes, block by block."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def fully_shard_blocks(model: nn.Module, mesh: Any) -> None:
    """Shard each repeated block of a model, and the rest of it, with FSDP2.

    Source: PyTorch's ``torch.distributed.fsdp.fully_shard`` (PyTorch 2.6 or newer).

    Args:
        model: The model.
        mesh: A ``DeviceMesh`` of one dimension, over the processes that share the parameters.
    """
    from torch.distributed.fsdp import fully_shard

    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of a model's outermost module lists, such as the layers of a transformer."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else repeated_blocks(child)
