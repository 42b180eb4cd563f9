"""Which weights of a model are quantized, and how."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.fqn import base_modules, clean_fqn
from lightning_lora.layers import LoraQuantizedLinear, QuantizedStorage, storage_of
from lightning_lora.model.targets import TargetError


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedStorage, Tensor]]:
    """The quantized layers of a model, also of merged ones: name, module, what reads it, and the packed weight."""
    for name, module in base_modules(model):
        storage = module._storage if isinstance(module, LoraQuantizedLinear) else storage_of(module)
        if storage is not None:
            packed = module.packed if isinstance(module, LoraQuantizedLinear) else module._parameters["weight"]
            yield clean_fqn(name), module, storage, packed  # type: ignore[misc]


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has quantized layers."""
    return next(quantized_layers(model), None) is not None


def quantization(model: nn.Module) -> list[dict[str, Any]]:
    """How the weights of a model are quantized: each format in plain types, with its number of ``layers`` and bytes."""
    formats: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for _, module, storage, packed in quantized_layers(model):
        record = storage.record(module, packed)
        key = tuple((name, str(value)) for name, value in record.items())
        entry = formats.setdefault(key, {**record, "layers": 0, "bytes": 0})
        entry["layers"] += 1
        entry["bytes"] += storage.size(module, packed)
    return list(formats.values())


def described(formats: Iterable[Mapping[str, Any]]) -> str:
    """What :func:`quantization` gave, in words."""
    words = [
        f"{entry.get('layers', '?')} layers by {entry.get('library', 'an unknown library')} ("
        + ", ".join(f"{name}={value}" for name, value in entry.items() if name not in ("library", "layers", "bytes"))
        + f"), {entry.get('bytes', 0) / 1e6:.1f} MB"
        for entry in formats
    ]
    return "quantized: " + "; ".join(words) if words else "not quantized"


def require_unquantized(model: nn.Module, saved: Mapping[str, nn.Module | Tensor]) -> None:
    """Require that nothing that is to be trained in full is quantized.

    Raises:
        TargetError: If something is.
    """
    for name, module in saved.items():
        for inner, *_ in quantized_layers(module) if isinstance(module, nn.Module) else ():
            full_name = f"{name}.{inner}".strip(".")
            raise TargetError(
                f"{full_name!r} would be trained in full (modules_to_save), and its weight is quantized, so it cannot "
                "be: leave it out, or load the model with this layer unquantized (llm_int8_skip_modules in the "
                "quantization config of transformers). Nothing was changed."
            )
