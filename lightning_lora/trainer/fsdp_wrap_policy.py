"""How FSDP is to wrap a model with adapters: the few trained parameters apart from the many frozen ones."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.layers import Adapter

_CALLED = (nn.Linear, nn.Embedding)  # these very classes: some subclasses of them are read and never called


def lora_auto_wrap_policy(*blocks: type[nn.Module]) -> "AdapterWrapPolicy":
    """An ``auto_wrap_policy`` for ``FullyShardedDataParallel``: each block is a unit, and each adapter one of its own.

    FSDP flattens all parameters of a unit into one, for all of which gradients are made and sent; so adapters in a unit
    of frozen weights would cost as much as full fine-tuning. With ``FSDPStrategy(auto_wrap_policy={YourBlock})``, the
    ``LoRA`` callback does the same by itself.

    Args:
        blocks: Classes of modules to wrap, such as a transformer's block.
    """
    return AdapterWrapPolicy(lambda module, recurse, nonwrapped_numel: isinstance(module, blocks))


class AdapterWrapPolicy:
    """A policy that wraps what another one wraps, and each module that is trained on its own."""

    def __init__(self, policy: Callable[..., bool] | None = None) -> None:
        self.policy = policy

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int, **kwargs: Any) -> bool:
        if recurse or _is_trained_alone(module):
            return True
        return self.policy is not None and self.policy(module, recurse=False, nonwrapped_numel=nonwrapped_numel)


def _is_trained_alone(module: nn.Module) -> bool:
    if isinstance(module, Adapter):
        return module.is_called  # else no unit would ever be made whole
    return type(module) in _CALLED and all(parameter.requires_grad for parameter in module.parameters())
