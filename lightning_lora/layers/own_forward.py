"""What stands in an object for its class's forward, or around it: told, so that it is called."""

from types import MethodType

from torch import nn


def has_own_forward(layer: nn.Module) -> bool:
    """Whether an object has a forward of its own, and not one that leads to its class's."""
    return "forward" in vars(layer) and not class_forwards(layer)


def class_forwards(layer: nn.Module) -> list[str]:
    """The attributes of an object that are the forward of its class."""
    return [
        name
        for name, value in vars(layer).items()
        if isinstance(value, MethodType) and value.__self__ is layer and value.__func__ is type(layer).forward
    ]


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class's forward, so that it must be called."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" in vars(module) or any(hooks)
