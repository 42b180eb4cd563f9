"""Looks, in a model's first forward, whether code reads the weight of an adapted layer beside calling the layer.

Such code would go on with the base's weight, whereas merging changes it for all.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lora.layers import LoraLayer, LoraParameters, Target
from lightning_lora.model.targets import TargetError, modules_by_name
from lightning_lora.model.weight_reads import weight_reads


def watch_reads(model: nn.Module, targets: Iterable[Target]) -> None:
    """Have the first forward of each module that may read the weight of an adapted layer find out whether it does.

    Raises:
        TargetError: That first forward, once it is through, if it does.
    """
    names = modules_by_name(model)
    reads = weight_reads(names)
    for target in targets:
        if not issubclass(target.layer_class, LoraParameters):
            for parameter in target.parameters:
                full_name = f"{target.name}.{parameter}".lstrip(".")
                for read in reads.get(full_name, ()):
                    _ReadWatch(names[read.reader], target.module, full_name, parameter).start()


class _ReadWatch:
    def __init__(self, reader: nn.Module, layer: nn.Module, name: str, parameter: str) -> None:
        self._reader, self._layer, self._name, self._parameter = reader, layer, name, parameter
        self._handles: list[Any] = []
        self._mode: _Finding | None = None

    def start(self) -> None:
        self._handles = [
            self._reader.register_forward_pre_hook(self._before),
            self._reader.register_forward_hook(self._after, always_call=True),
            self._layer.register_forward_pre_hook(self._enter),
            self._layer.register_forward_hook(self._leave, always_call=True),
        ]

    def _before(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self._mode is not None:  # type: ignore
            return
        if not isinstance(self._layer, LoraLayer):  # it was taken out
            self._stop()
        elif self._layer.active and not self._layer.merged:
            self._mode = _Finding(self._layer.get_parameter(self._parameter))
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.depth += 1

    def _leave(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.depth -= 1

    def _after(self, *_: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._stop()
        if mode.found:
            raise TargetError(
                f"{type(self._reader).__name__} computes with {self._name!r} beside calling the layer, whose adapter "
                "acts on its calls alone, so what is trained would not be what is merged. Adapt the weight wherever it "
                f'is read, by target_parameters=["{self._name}"], or leave the layer out with exclude_modules.'
            )


class _Finding(TorchFunctionMode):
    """Whether a tensor goes into an operation that gives tensors, while no call of its layer runs."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor
        self.depth = 0
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Dynamo of torch 2.13 would trace what looks on, and make something else of the results.
        if not torch.compiler.is_compiling() and self.depth == 0:
            self._look([*args, *(kwargs or {}).values()], result)
        return result

    def _look(self, given: list[Any], result: Any) -> None:
        if any(True for _ in tensors_in([result])):
            self.found |= any(each is self._tensor for each in tensors_in(given))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among what a function is given or gives, also in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
