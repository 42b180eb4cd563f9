"""Whether the values of a layer's parameters can be read, and folded into."""

from collections.abc import Iterable

from torch import Tensor, nn

from lightning_lora.layers.quantized import WAY_ON, storage_of
from lightning_lora.layers.seal import wraps_tensors


def weightless_reason(module: nn.Module, parameters: Iterable[str] = ("weight",)) -> str | None:
    """Why a module has not the weights to adapt, whatever the settings; ``None`` if it has."""
    owners = ((module.get_submodule(owner), name) for owner, _, name in (path.rpartition(".") for path in parameters))
    if not all(name in owner._parameters for owner, name in owners):
        return "its weight is computed of others (a parametrization), so nothing can be folded into it"
    return None


def unreadable_reason(module: nn.Module, parameters: Iterable[str]) -> str | None:
    """Why the values of the parameters to adapt cannot be read, ``None`` if they can."""
    if (storage := storage_of(module)) is not None:
        return (
            f"its weight is quantized ({storage.supported}), and of a quantized layer only the whole "
            "can be adapted, with target_modules and without fused_qkv"
        )
    for name in parameters:
        owner_name, _, attribute = name.rpartition(".")
        parameter = module.get_submodule(owner_name)._parameters.get(attribute)
        if parameter is not None and not is_readable(parameter):
            return (
                f"its {name} holds {parameter.dtype} in a {type(parameter).__module__}.{type(parameter).__name__}, a "
                f"quantized format of which the values cannot be read here: {WAY_ON}"
            )
    return None


def is_readable(parameter: Tensor) -> bool:
    """Whether the values of a parameter are in it as they are, which they are not in packed and quantized ones."""
    is_foreign = wraps_tensors(parameter) and not type(parameter).__module__.startswith("torch.")
    return not is_foreign and (parameter.is_floating_point() or parameter.is_complex())
