"""Looks, in the first training batch, whether the step computes with the weight of an adapted layer beside calling it.

What a model's own forwards read is found when it is injected. A ``training_step`` may read too, also under other names
(``table = self.items; scores = hidden @ table.weight.T``). It would go on with the base's weight, whereas merging
changes it for all.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
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

    def start(self) -> None:
        """The batch begins."""
        if not self._is_over and self._mode is None:
            self._mode = _Computing(self._module)
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


class _Computing(TorchFunctionMode):
    """Finds where the values of an adapted weight, outside of a forward of a module that has it, meet a gradient.

    So no weight that is only looked at counts, as in a norm that is logged, and nothing in ``torch.no_grad()``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: str | None = None
        self._owners: dict[int, set[int]] = {}  # modules that have it, by whose forwards it is read
        self._layers: dict[int, LoraLayer] = {}
        # What is told by its identity is kept, so that nothing else has that as long.
        self._adapted: dict[int, tuple[Tensor, str]] = {}
        self._derived: dict[int, tuple[Tensor, str]] = {}
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Dynamo of torch 2.13 would trace what looks on, and make something else of the results.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and self.found is None:
            self._look(func, args, kwargs or {}, result)
        return result

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = next(filter(None, map(self._read_in, _values(func, args, kwargs))), None)
        for out in tensors_in([result]) if name is not None else ():
            if out.grad_fn is not None:
                self.found = name
            elif not out.requires_grad and out.dim() > 0 and out.is_floating_point():  # and no parameter made of it
                self._derived[id(out)] = out, name  # type: ignore[assignment]

    def _read_in(self, tensor: Tensor) -> str | None:
        """The name of the weight of which a tensor has the values, if it was read beside its layer."""
        key = id(tensor)
        if key in self._derived:
            return self._derived[key][1]
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
