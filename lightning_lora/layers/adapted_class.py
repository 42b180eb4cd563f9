"""The class that a base layer takes on while it is adapted, made of its own, and the way there and back."""

import inspect
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from lightning_lora.layers.base import LoraLayer
from lightning_lora.layers.own_forward import class_forwards, has_own_forward


def class_problem(layer_class: type[LoraLayer], module: nn.Module) -> str | None:
    """Why a module cannot take on the class of an adapted layer, ``None`` if it can."""
    base = type(module)
    try:
        # Not by the class's own __new__, by which FSDP2's makes a layer that is not sharded.
        object.__new__(base).__class__ = adapted_class(layer_class, base)  # type: ignore[arg-type]
    except TypeError as error:
        return (
            f"Python cannot give it another class ({error}): its class puts another kind of class, such as ABC, before "
            "the layer's among its bases; put it after"
        )
    return None


@cache
def adapted_class(layer_class: type[LoraLayer], base: type[nn.Module]) -> type[LoraLayer]:
    """The class of a ``base`` module that is adapted as a ``layer_class``."""
    _, *inputs = inspect.signature(base.forward).parameters.values()
    x = next((each.name for each in inputs[:1] if each.kind is each.POSITIONAL_OR_KEYWORD), None)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not args and x in kwargs:  # each class has a name of its own for its input
            args = (kwargs.pop(x),)
        if not isinstance(self, LoraLayer):  # whoever wrapped the layer's forward has kept this one
            return type(self).forward(self, *args, **kwargs)
        return super(adapted, self).forward(*args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy must find it by the base class.
        _, _, *state = super(adapted, self).__reduce_ex__(protocol)
        return (_new_adapted, adapted.__bases__, *state)

    forward.__signature__ = inspect.signature(layer_class.forward)  # type: ignore[attr-defined]  # for torch.export
    # torch.fx takes modules of torch's own packages for leaves.
    names = {"__module__": base.__module__, "_is_adapted": True, "unadapted": base}
    methods = {"forward": forward, "__reduce_ex__": reduce}
    adapted: type[LoraLayer] = type(f"Lora{base.__name__}", (layer_class, base), names | methods)
    return adapted


def change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Give a layer another class: adapt it, or take its adapters out.

    What the object holds of its class's forward, as accelerate's hooks do, becomes the new class's. A forward that
    somebody gave to the object itself is called in the place of the class's while the layer is adapted.
    """
    attributes = vars(layer)
    own = attributes.pop("_own_forward", None)
    if has_own_forward(layer) and not isinstance(layer, LoraLayer):
        # Under a hook of accelerate's, it is what that calls.
        is_under_hook = "_old_forward" in attributes
        attributes["_own_forward"] = attributes.pop("_old_forward" if is_under_hook else "forward")
        if is_under_hook:
            attributes["_old_forward"] = MethodType(type(layer).forward, layer)
    new = own or MethodType(cls.forward, layer)
    attributes.update(dict.fromkeys(class_forwards(layer), new))
    if own is not None:
        attributes.setdefault("forward", own)
    layer.__class__ = cls


def base_class(layer: LoraLayer) -> type[nn.Module]:
    """The class that an adapted layer had before."""
    return type(layer).unadapted


def class_without_adapter(layer: LoraLayer) -> type[nn.Module]:
    """The class for a layer to go back to: the one before, with what was made of it since by sharding the layer."""
    own, adapted = type(layer), _adapted(layer)
    if own is adapted:
        return base_class(layer)
    bases = tuple(base_class(layer) if base is adapted else base for base in own.__bases__)
    # Parametrizations have the weight that they compute in the class.
    names = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
    return type(own.__name__.replace(adapted.__name__, bases[-1].__name__), bases, names)


def _adapted(layer: LoraLayer) -> type[nn.Module]:
    return next(cls for cls in type(layer).__mro__ if "_is_adapted" in vars(cls))


def _new_adapted(layer_class: type[LoraLayer], base: type[nn.Module]) -> LoraLayer:
    cls = adapted_class(layer_class, base)  # type: ignore[arg-type]
    return cls.__new__(cls)
