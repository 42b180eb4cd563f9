"""Whether a layer of any class computes ``x W^T + b``, as ``nn.Linear`` does: told by its attributes and a trial."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_Attributes = tuple[tuple[str, Any], ...]


def computes_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, whatever its class.

    Its class's forward is tried on numbers of its own, so that nothing of the module is read or changed, and a layer on
    the meta device is no other than it will be.

    Args:
        module: Any module that is not adapted.
    """
    if isinstance(module, torch.jit.ScriptModule):  # whose class is not what it computes
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    sizes = [(getattr(module, f"out_{of}", None), getattr(module, f"in_{of}", None)) for of in ("features", "channels")]
    # A shape is a tuple; and none of a lazy parameter.
    if type(weight) is not nn.Parameter or weight.dim() != 2 or tuple(weight.shape) not in sizes:
        return False
    others = {name for name, parameter in module._parameters.items() if parameter is not None} - {"weight", "bias"}
    if module._modules or module._buffers or others or not weight.is_floating_point():
        return False
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | None)}
    plain.pop("training")
    key = (tuple(weight.shape), bias is not None, tuple(sorted(plain.items())))
    return _is_linear(type(module), *key)  # type: ignore[arg-type]


@cache
def _is_linear(cls: type[nn.Module], shape: tuple[int, int], has_bias: bool, plain: _Attributes) -> bool:
    trial = cls.__new__(cls)
    nn.Module.__init__(trial)
    vars(trial).update(dict(plain), training=True)  # in which it does all that it does
    x, weight, bias = _numbers(2, shape[1]), _numbers(*shape), _numbers(shape[0]) if has_bias else None
    trial.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    trial.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    expected = nn.functional.linear(x, weight, bias)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = cls.forward(trial, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
        return False  # it takes other inputs
    return isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected, 1e-4, 1e-4)


def _numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that no generator gives."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).mul_(0.37).sin_().view(shape)
