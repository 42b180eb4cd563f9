"""What is asked of each way to keep a linear layer's weight in fewer bits."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

PLAIN = "weight"  # of an ordinary linear layer
Packed: TypeAlias = Mapping[str, Any]


class QuantizedStorage(ABC):
    """How one library keeps the weight of a linear layer in fewer bits, its *packed* weight.

    It is stateless, tells layers of its kind by the names of their classes, and imports its library only once it has
    met one. A packed weight is given to it by parts: by their names in the layer, the values of :attr:`parts` that are
    there. They are the layer's own, or what it had before an adapter was merged.
    """

    supported: ClassVar[str]  # what errors call it
    attributes: ClassVar[tuple[str, ...]] = ()  # of a layer, beside those of nn.Linear and the parts
    parts: ClassVar[tuple[str, ...]] = (PLAIN,)
    """Names of the parameters, buffers and attributes that a packed weight consists of; first that of the codes."""
    broadcasts: ClassVar[bool] = True  # whether DDP can send the packed weight from the first process to the others

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a layer's weight is kept in this way."""

    @abstractmethod
    def shape(self, module: nn.Module, packed: Packed) -> torch.Size:
        """The shape of the weight that the packed one stands for: ``(out_features, in_features)``."""

    @abstractmethod
    def dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        """The type of the weight before it was packed, ``None`` if that is not known any more."""

    @abstractmethod
    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        """The values that the layer computes with, in float32, a new tensor of :meth:`shape`."""

    @abstractmethod
    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        """Another weight, packed in just the same way.

        Raises:
            ValueError: If this cannot be done.
        """

    @abstractmethod
    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        """What checkpoints say of it, in plain types: all settings that decide which values a weight gets."""

    @abstractmethod
    def size(self, module: nn.Module, packed: Packed) -> int:
        """The bytes of the packed weight, with its scales."""

    def is_ready(self, module: nn.Module, packed: Packed) -> bool:
        """Whether the weight is quantized by now, where a library does so late."""
        return True

    def cast_with(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        """The floating-point type that the bits are kept in, in which a cast of the model would destroy them."""
        return None

    def only_dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        """The floating-point type that inputs and gradients must have, also under autocast; ``None`` if any will do."""
        return None

    def unshardable_reason(self, packed: Packed, flat: bool) -> str | None:
        """Why processes cannot share the packed weight, ``None`` if they can.

        Args:
            packed: The packed weight.
            flat: Whether it becomes a slice of a flat parameter (FSDP), and no ``DTensor`` (FSDP2).
        """
        return f"{self.supported} cannot be cut up"

    def refusal(self, module: nn.Module, packed: Packed) -> str | None:
        """Why the weight of this very layer cannot be read exactly, ``None`` if it can."""
        return None

    def beside(self, packed: Packed) -> dict[str, nn.Parameter]:
        """What an ordinary layer has beside its weight that is here a part of the packed one: a bias."""
        return {}

    def packed(self, module: nn.Module) -> Packed:
        """The packed weight of a layer, by parts."""
        return _values(module, self.parts)

    def codes(self, packed: Packed) -> Tensor:
        """The part that has most of the bits, whose device is the weight's."""
        codes: Tensor = packed[self.parts[0]]
        return codes

    def tensors(self, packed: Packed) -> list[Tensor]:
        """All parts that are tensors of the layer itself, the codes first."""
        return [value for value in packed.values() if isinstance(value, Tensor)]

    def swap(self, module: nn.Module, other: Packed) -> Packed:
        """Put another weight, by its parts, in the place of a layer's own, and return that, complete by itself.

        Args:
            module: The layer.
            other: A packed weight, or an ordinary one and what is :meth:`beside` it.
        """
        before = _kept(module, _values(module, dict.fromkeys((*self.parts, PLAIN))))
        device, others = (next(tensors_in(each)).device for each in (before, other))
        if device != others:  # for the model was moved since
            other = {name: _moved(value, device) for name, value in other.items()}
        for name, value in before.items():
            if not (isinstance(value, nn.Parameter) and isinstance(other.get(name), nn.Parameter)):
                delattr(module, name)  # and leave the order of the others
        for name, value in other.items():
            setattr(module, name, value)
        return before

    def plain_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        """The class for a layer of a given class to have once its weight is an ordinary one."""
        return cls

    def strip(self, module: nn.Module) -> dict[str, Any]:
        """Take from a layer whose weight is an ordinary one now what is for packed ones, and return it by attribute."""
        return {name: vars(module).pop(name) for name in self.attributes if name in vars(module)}


def _values(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Those that are there."""
    return {name: value for name in names if (value := getattr(module, name, None)) is not None}


def _kept(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a module as they can be set again: buffers as such."""
    passing = module._non_persistent_buffers_set
    buffers = values.keys() & module._buffers.keys()
    return values | {name: nn.Buffer(values[name], persistent=name not in passing) for name in buffers}


def _moved(value: Any, device: torch.device) -> Any:
    """A part on a device."""
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device)
    if isinstance(value, nn.Buffer):
        return nn.Buffer(moved, persistent=value.persistent)
    is_parameter = isinstance(value, nn.Parameter) and not isinstance(moved, nn.Parameter)
    return nn.Parameter(moved, requires_grad=False) if is_parameter else moved


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in a part, or in several."""
    if isinstance(tree, Tensor):
        yield tree
    for each in tree.values() if isinstance(tree, Mapping) else ():
        yield from tensors_in(each)
