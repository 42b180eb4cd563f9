"""Freeze a base and thaw it: parameters, running statistics, and torch's fused encoder path."""

from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.fqn import is_submodule
from lightning_lora.model.record import Injection, parameters_by_name
from lightning_lora.model.targets import modules_by_name

_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


class FrozenNorm(nn.Module):
    """A normalization layer of the base with running statistics: it uses them, and no training step moves them.

    Whatever mode is asked for, the layer works as in evaluation. The mode asked for is what it has when it is thawed.
    """

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return (_new_frozen_norm, (type(self).__bases__[1],), *state)


@cache
def _frozen_norm_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{base.__name__}", (FrozenNorm, base), {"__module__": __name__})


def _new_frozen_norm(base: type[nn.Module]) -> nn.Module:
    cls = _frozen_norm_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def freeze_norms(model: nn.Module, injection: Injection) -> None:
    for name, module in modules_by_name(model).items():
        inside_saved = any(is_submodule(name, saved) for saved in injection.saved)
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        if tracks and not inside_saved and not isinstance(module, FrozenNorm):
            injection.frozen_norms.append(name)
            module.__class__ = _frozen_norm_class(type(module))  # type: ignore[arg-type]


def leave_fused_path(model: nn.Module, injection: Injection) -> None:
    """Have torch's transformer encoders call their layers in eval mode too, where they else read the weights alone."""
    for name, module in modules_by_name(model).items():
        if isinstance(module, _ENCODERS) and any(is_submodule(target, name) for target in injection.targets):
            for switch in ("activation_relu_or_gelu", "use_nested_tensor"):
                if getattr(module, switch, False):
                    injection.fused[f"{name}.{switch}"] = getattr(module, switch)
                    setattr(module, switch, False)


def thaw(model: nn.Module, injection: Injection) -> None:
    parameters = parameters_by_name(model)
    for name in injection.frozen:
        parameters[name].requires_grad_(True)
    modules = modules_by_name(model)
    for name in injection.frozen_norms:
        norm = modules[name]
        norm.__class__ = type(norm).__bases__[1]
    injection.frozen_norms = []
    for name, value in injection.fused.items():
        owner, _, switch = name.rpartition(".")
        setattr(modules[owner], switch, value)
    injection.fused = {}
