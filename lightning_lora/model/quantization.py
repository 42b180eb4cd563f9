"""Which weights of a model are quantized, and how."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.fqn import base_modules, clean_fqn
from lightning_lora.layers import Packed, QuantizedStorage, stored
from lightning_lora.layers.quantized.storage import PLAIN
from lightning_lora.model.targets import TargetError
from lightning_lora.sharding import named_tensors


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedStorage, Packed]]:
    """The quantized layers of a model, also of merged ones: name, module, what reads it, and the packed weight."""
    for name, module in base_modules(model):
        found = stored(module)
        if found is not None:
            yield clean_fqn(name), module, *found


def plain_tensors(model: nn.Module, of_base: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """As :func:`~lightning_lora.sharding.named_tensors`, by the names that they have where nothing is quantized."""
    for name, module, inner in named_tensors(model, of_base):
        stem = name.removesuffix(inner)
        yield from ((f"{stem}{plain}", module, own) for plain, own in plain_names(module, inner))


def plain_names(module: nn.Module, inner: str) -> Iterator[tuple[str, str]]:
    """What a tensor of a module stands for, by its name in an ordinary module and here.

    Of a packed weight, it is the codes that stand for all of it, and for what an ordinary layer has beside it.
    """
    found = stored(module)
    beside = () if found is None else found[0].beside(found[1])
    if found is None or inner not in found[0].parts or inner in beside:
        yield inner, inner
    elif inner == found[0].parts[0]:
        yield PLAIN, inner
        yield from ((other, other) for other in beside if other not in module._parameters)


def stands_for_packed(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module is the weight of a quantized layer: the codes, or what an adapter is merged into."""
    found = stored(module)
    return found is not None and name in (found[0].parts[0], PLAIN)


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
