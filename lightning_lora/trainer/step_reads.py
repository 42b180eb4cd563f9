"""Looks, in the first training batch, whether the step computes with the weight of an adapted layer beside calling it.

What a model's own forwards read is found when it is injected. A ``training_step`` may read too, also under other names
(``table = self.items; scores = hidden @ table.weight.T``). It would go on with the base's weight, whereas merging
changes it for all.

A value of weights alone, such as their norm in a penalty, is no such reading, and a frozen one is a constant in the
loss: a warning says so.
"""

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]  # what it uses
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lora.compiled import is_compiled
from lightning_lora.layers import LoraLayer
from lightning_lora.model.read_watch import tensors_in
from lightning_lora.model.targets import TargetError, modules_by_name

_LIKE = {"empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like", "is_nonzero"}
_AS = {"expand_as", "reshape_as", "to", "type_as", "view_as"}


class StepReads:
    """Watches the first training batch of a module with adapters; not, if parts of it are compiled."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._mode: _Computing | None = None
        self._is_over = any(map(is_compiled, module.modules()))

    def start(self, batch: Any) -> None:
        """The batch begins."""
        if not self._is_over and self._mode is None:
            self._mode = _Computing(self._module, batch)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def require_none(self) -> None:
        """Require that no step so far did so.

        Raises:
            TargetError: If one did.
        """
        if self._mode is not None and self._mode.found is not None:
            name = self._mode.found
            raise TargetError(
                f"The training step computes with {name!r} beside calling the layer, whose adapter acts on its calls "
                "alone, so what is trained would not be what is merged. Leave the layer out with exclude_modules, or "
                "train it in full with modules_to_save; or compute so in the forward of a module, and adapt the weight "
                f'there, by target_parameters=["{name}"].'
            )

    def stop(self) -> None:
        """The batch is over."""
        mode, self._mode = self._mode, None
        if mode is not None:
            self._is_over = True
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if mode.penalty is not None:
                rank_zero_warn(
                    f"A value of {mode.penalty!r} alone is in the loss, as in a penalty on weights. This weight is "
                    "frozen, so that is a constant, and the adapter's update is not in it: of weights, such a penalty "
                    "acts on those that are trained, the adapter's A and B if they are among its parameters."
                )


@dataclass(frozen=True)
class _Origin:
    """What a tensor was made of: whether of data, and the adapted weight in it that was read beside its layer."""

    of_data: bool
    weight: str | None = None


class _Computing(TorchFunctionMode):
    """Finds where values of an adapted weight, outside of a forward of a module that has it, meet data and a gradient.

    So no weight that is only looked at counts, as in a norm that is logged, and nothing in ``torch.no_grad()``. One
    value that was made of weights alone is a penalty where it meets both.
    """

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()
        self.found: str | None = None
        self.penalty: str | None = None
        self._owners: dict[int, set[int]] = {}  # modules that have it, by whose forwards it is read
        self._layers: dict[int, LoraLayer] = {}
        self._adapted: dict[int, tuple[Tensor, str]] = {}  # kept, so that nothing else has their identity as long
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Origin]] = {}
        for name, layer in modules_by_name(module).items():
            if isinstance(layer, LoraLayer):
                for inner, parameter in layer.adapted_parameters().items():
                    # What others compute (pruning, weight_norm) is a tensor of one call.
                    if isinstance(parameter, nn.Parameter):
                        self._adapted.setdefault(id(parameter), (parameter, f"{name}.{inner}".lstrip(".")))
                        self._layers[id(parameter)] = layer
                        self._owners.setdefault(id(parameter), set()).add(id(layer))
        for each in module.modules():
            for key in map(id, each._parameters.values()):
                if key in self._adapted:
                    self._owners[key].add(id(each))
        apply_to_collection(batch, Tensor, lambda tensor: self._note(tensor, _Origin(of_data=True)))
        self._knows_data = bool(self._origins)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Dynamo of torch 2.13 would trace what looks on, and make something else of the results.
        if not torch.compiler.is_compiling() and self.found is None:
            self._look(list(_values(func, args, kwargs or {})), result)
        return result

    def _look(self, given: list[Tensor], result: Any) -> None:
        origins = [self._origin(tensor) for tensor in given]
        of_data = any(origin.of_data for origin in origins)
        read = [(tensor, origin) for tensor, origin in zip(given, origins) if origin.weight is not None]
        name = next((origin.weight for _, origin in read), None) if torch.is_grad_enabled() else None
        # One value of weights alone stands beside the data, as a penalty does, and is not what is computed of it.
        beside = of_data and all(tensor.numel() == 1 and not origin.of_data for tensor, origin in read)
        for out in tensors_in([result]):
            if name is not None and of_data and out.grad_fn is not None:
                self.penalty, self.found = (name, None) if beside else (self.penalty, name)
            elif not isinstance(out, nn.Parameter):  # which is a value of its own from here on
                self._note(out, _Origin(of_data, name if out.is_floating_point() and not beside else None))

    def _note(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[id(tensor)] = weakref.ref(tensor), origin

    def _origin(self, tensor: Tensor) -> _Origin:
        reference, origin = self._origins.get(id(tensor), (None, None))
        if origin is not None and reference is not None and reference() is tensor:
            return origin
        if isinstance(tensor, nn.Parameter):
            return _Origin(of_data=False, weight=self._read_in(tensor))
        return _Origin(of_data=tensor.grad_fn is not None or not self._knows_data)

    def _read_in(self, parameter: nn.Parameter) -> str | None:
        """The name of an adapted weight, if it is read beside its layer."""
        key = id(parameter)
        if key not in self._adapted or not self._layers[key].active or self._layers[key].merged:
            return None
        return None if _in_forward_of(self._owners[key]) else self._adapted[key][1]


def _values(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of whose values a function makes its result."""
    name = getattr(func, "__name__", "")
    if name in _LIKE or name.startswith("new_"):
        return iter(())
    return tensors_in(args[:1] if name in _AS else [*args, *kwargs.values()])


def _in_forward_of(modules: set[int]) -> bool:
    """Whether a forward of one of these modules is running, however it was called."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames and id(frame.f_locals.get(code.co_varnames[0])) in modules:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
