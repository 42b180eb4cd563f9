"""What is asked of each way to keep a linear layer's weight in fewer bits."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class QuantizedStorage(ABC):
    """How one library keeps the weight of a linear layer in fewer bits, its *packed* weight.

    It is stateless, tells layers of its kind by the names of their classes, and imports its library only once it has
    met one. Where it is given a packed weight, that is the layer's own, or what it had before an adapter was merged.
    """

    supported: ClassVar[str]  # what errors call it
    broadcasts: ClassVar[bool] = True  # whether DDP can send the packed weight from the first process to the others

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a layer's weight is kept in this way."""

    @abstractmethod
    def shape(self, module: nn.Module, packed: Tensor) -> torch.Size:
        """The shape of the weight that the packed one stands for: ``(out_features, in_features)``."""

    @abstractmethod
    def dtype(self, module: nn.Module, packed: Tensor) -> torch.dtype | None:
        """The type of the weight before it was packed, ``None`` if that is not known any more."""

    @abstractmethod
    def dequantized(self, module: nn.Module, packed: Tensor) -> Tensor:
        """The values that the layer computes with, in float32, a new tensor of :meth:`shape`."""

    @abstractmethod
    def requantized(self, module: nn.Module, packed: Tensor, weight: Tensor) -> nn.Parameter:
        """Another weight, packed in just the same way.

        Raises:
            ValueError: If this cannot be done.
        """

    @abstractmethod
    def record(self, module: nn.Module, packed: Tensor) -> dict[str, Any]:
        """What checkpoints say of it, in plain types: all settings that decide which values a weight gets."""

    @abstractmethod
    def size(self, module: nn.Module, packed: Tensor) -> int:
        """The bytes of the packed weight, with its scales."""

    def is_ready(self, module: nn.Module, packed: Tensor) -> bool:
        """Whether the weight is quantized by now, where a library does so late."""
        return True

    def cast_with(self, module: nn.Module, packed: Tensor) -> torch.dtype | None:
        """The floating-point type that the bits are kept in, in which a cast of the model would destroy them."""
        return None

    def unshardable_reason(self, packed: Tensor, flat: bool) -> str | None:
        """Why processes cannot share the packed weight, ``None`` if they can.

        Args:
            packed: The packed weight.
            flat: Whether it becomes a slice of a flat parameter (FSDP), and no ``DTensor`` (FSDP2).
        """
        return f"{self.supported} cannot be cut up"

    def refusal(self, module: nn.Module, packed: Tensor) -> str | None:
        """Why the weight of this very layer cannot be read exactly, ``None`` if it can."""
        return None

    def swap(self, module: nn.Module, other: nn.Parameter) -> nn.Parameter:
        """Put another weight, packed or plain, in the place of a layer's own, and return that, complete by itself."""
        before = module._parameters["weight"]
        assert before is not None
        if other.device != before.device:
            moved = other.to(before.device)
            other = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
        module._parameters["weight"] = other
        return before

    def plain_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        """The class for a layer of a given class to have once its weight is an ordinary one."""
        return cls

    def strip(self, module: nn.Module) -> dict[str, Any]:
        """Take from a layer whose weight is an ordinary one now what is for packed ones, and return it by attribute."""
        return {}
