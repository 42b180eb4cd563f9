"""Freeze a base and thaw it: parameters, running statistics, and torch's fused encoder path."""

from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_lora.fqn import clean_fqn, is_submodule
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.model.record import Injection, base_parameters, parameters_by_name
from lightning_lora.model.targets import modules_by_name

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, type(None))
_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


class FrozenNorm(nn.Module):
    """A normalization layer of the base with running statistics: it uses them, and no training step moves them.

    Whatever its mode, it runs as in evaluation. The mode itself is the one that was asked for, so that whoever notes
    modes and puts them back, as Lightning does around a validation, puts back the right one.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.training
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = mode

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return (_new_frozen_norm, (type(self).__bases__[1],), *state)


@cache
def _frozen_norm_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{base.__name__}", (FrozenNorm, base), {"__module__": __name__})


def _new_frozen_norm(base: type[nn.Module]) -> nn.Module:
    cls = _frozen_norm_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


class KeepFrozen:
    """A hook before the forward of a module that holds frozen norms: what has taken the place of one is frozen too.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes new layers, and says so to nobody.

    Args:
        paths: Where the norms are, below the module.
    """

    def __init__(self, paths: list[tuple[str, ...]]) -> None:
        self.paths = paths

    def __call__(self, module: nn.Module, args: Any) -> None:
        for path in self.paths:
            norm: nn.Module | None = module
            for part in path:
                norm = norm and norm._modules.get(part)
            if norm is not None and norm.training and not isinstance(norm, FrozenNorm):
                norm.training = False


def freeze(injection: Injection) -> None:
    """Freeze the base under an injection: what it does not train gets no gradient, and its statistics stand still."""
    # Under every name of theirs, of which tied ones have several, before any is frozen.
    trainable = [(clean_fqn(name), each) for name, each in base_parameters(injection.root) if each.requires_grad]
    injection.frozen += [name for name, _ in trainable]
    for _, parameter in trainable:
        parameter.requires_grad_(False)
    _freeze_parts(injection.root)
    freeze_norms(injection)
    _leave_fused_path(injection)


def _freeze_parts(root: nn.Module) -> None:
    """Cut off what quantized layers hold in no parameter from what it was computed of when they were made."""
    for _, _, storage, packed in quantized_layers(root):
        for tensor in storage.tensors(packed):
            if not isinstance(tensor, nn.Parameter):
                tensor.detach_()


def freeze_norms(injection: Injection) -> None:
    """Freeze the running statistics of normalization layers, also of those that have come since an earlier call."""
    modules, found = modules_by_name(injection.root), []
    for name, module in modules.items():
        if tracks_statistics(module) and not injection.saves(name) and not isinstance(module, FrozenNorm):
            module.__class__ = _frozen_norm_class(type(module))  # type: ignore[arg-type]
            found.append(name)
    injection.frozen_norms += found
    _watch(modules, [name for name in found if isinstance(modules[name], _BatchNorm)])


def _watch(modules: dict[str, nn.Module], norms: list[str]) -> None:
    """Have the nearest module around each norm that is called keep it frozen."""
    paths: dict[str, list[tuple[str, ...]]] = {}
    for norm in norms:
        parts = norm.split(".")
        depths = range(len(parts) - 1, -1, -1)
        around = [depth for depth in depths if not isinstance(modules.get(".".join(parts[:depth])), _NEVER_CALLED)]
        if around:
            paths.setdefault(".".join(parts[: around[0]]), []).append(tuple(parts[around[0] :]))
    for name, found in paths.items():
        modules[name].register_forward_pre_hook(KeepFrozen(found))


def tracks_statistics(module: nn.Module) -> bool:
    """Whether it is one of torch's normalization layers with running statistics, or one like them by its buffers."""
    tracked = any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())
    return tracked and (isinstance(module, _NormBase) or not module._modules)


def _leave_fused_path(injection: Injection) -> None:
    """Have torch's transformer encoders call their layers in eval mode too, where they else read the weights alone."""
    for name, module in modules_by_name(injection.root).items():
        if isinstance(module, _ENCODERS) and any(is_submodule(target, name) for target in injection.targets):
            for switch in ("activation_relu_or_gelu", "use_nested_tensor"):
                if getattr(module, switch, False):
                    injection.fused.append((name, switch, getattr(module, switch)))
                    setattr(module, switch, False)


def thaw(injection: Injection) -> None:
    """Undo :func:`freeze`."""
    parameters = parameters_by_name(injection.root)
    frozen = set(injection.frozen)
    for name in {*injection.trained, *frozen}:
        if name in parameters:  # pruning and parametrizations rename
            parameters[name].requires_grad_(name in frozen)
    modules = modules_by_name(injection.root)
    for name in injection.frozen_norms:
        norm = modules.get(name)
        if isinstance(norm, FrozenNorm):
            norm.__class__ = type(norm).__bases__[1]
        elif norm is not None and (around := modules.get(name.rpartition(".")[0])) is not None:
            norm.training = around.training  # KeepFrozen's doing
    own = set(injection.frozen_norms)
    for name, module in modules.items():
        for key, hook in list(module._forward_pre_hooks.items()):
            # Those that keep another injection's norms stay.
            if isinstance(hook, KeepFrozen) and any(".".join((name, *path)).lstrip(".") in own for path in hook.paths):
                del module._forward_pre_hooks[key]
    for name, switch, value in injection.fused:
        if name in modules:
            setattr(modules[name], switch, value)
    injection.frozen, injection.fused, injection.frozen_norms = [], [], []
