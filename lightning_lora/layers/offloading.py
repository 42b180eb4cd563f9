"""Layers whose weights accelerate keeps elsewhere (``device_map``, ``cpu_offload``, ``disk_offload``).

Such a layer has weights on the meta device, and a hook that fetches them before each forward pass and drops them after.
Accelerate is told by the attributes that it puts on a module, and never imported here.
"""

from collections import ChainMap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def offloading_hook(module: nn.Module) -> Any:
    """The hook that fetches a module's weights, ``None`` if they are there."""
    hook: Any = vars(module).get("_hf_hook")
    # Accelerate chains several in one that has them in a list.
    return next((each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)), None)


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """The values of a module's parameter or buffer that is kept elsewhere, ``None`` if it is not."""
    hook = offloading_hook(module)
    found: Tensor | None = hook.weights_map[name] if hook is not None and name in hook.weights_map else None
    return found


class Shown:
    """A layer as an argument, which accelerate's hooks do not move to a device: all of it but ``to``."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        if name == "to":
            raise AttributeError(name)
        return getattr(self._layer, name)


@contextmanager
def onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have the weights of modules there meanwhile, to be read and not changed."""
    with ExitStack() as stack:
        for module in list(modules):
            hook = offloading_hook(module)
            if hook is not None:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def swap_offloaded(module: nn.Module, name: str, other: Tensor) -> Tensor | None:
    """Have a module find other values of a weight that is kept elsewhere, from now on.

    What is kept elsewhere, perhaps in a file, stays as it is: the new values lie over it in memory. To put back what
    this function returned uncovers it.

    Returns:
        What the module found before; ``None`` if the weight is not kept elsewhere, and nothing was done.
    """
    before = offloaded(module, name)
    if before is None:
        return None
    hook = offloading_hook(module)
    if not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    over, beneath = hook.weights_map.maps
    if name in over:
        del over[name]
    else:
        over[name] = other.detach().to(beneath[name].device)
    return before
