"""What an injection did to a model: the record by which it is found, switched and taken out."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import clean_fqn
from lightning_lora.layers import (
    LoraLayer,
)
from lightning_lora.model.targets import modules_by_name

ATTRIBUTE = "_lora_injections"


@dataclasses.dataclass
class Injection:
    """What one injection did to a model.

    Attributes:
        config: The settings.
        adapter_name: Name of the adapter.
        targets: Names of the adapted layers.
        saved: Names of the modules that are trained in full.
        originals: By the name of each parameter that is trained in full, the base's own.
        trained: By the same names, the trained copies.
        in_place: Whether the trained copies, and the rests below, are in the model now, and not the base's own.
        whole: By name, the base's weights out of which an adapter's start was taken.
        rest: By the same names, what was left of them.
        frozen: Names of the base parameters that were trainable before.
        frozen_norms: Names of the normalization layers whose statistics are frozen.
        fused: By name, the switches of torch's fused encoder path that were on.
        fingerprint: Of the base, once it is known.
        from_data: Whether the adapter's start was computed from data.
    """

    config: LoraConfig
    adapter_name: str
    targets: list[str] = dataclasses.field(default_factory=list)
    saved: list[str] = dataclasses.field(default_factory=list)
    originals: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    trained: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    in_place: bool = True
    whole: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    rest: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    frozen: list[str] = dataclasses.field(default_factory=list)
    frozen_norms: list[str] = dataclasses.field(default_factory=list)
    fused: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str | None = None
    from_data: bool = False


def injections_of(model: nn.Module) -> list[Injection]:
    """What was injected with this very module as the root."""
    found: list[Injection] = model.__dict__.get(ATTRIBUTE, [])
    return found


def injections(model: nn.Module) -> Iterator[tuple[str, nn.Module, Injection]]:
    """All injections in a model: the name of the module on which each was made, that module, and the record."""
    for name, module in model.named_modules():
        if ATTRIBUTE in module.__dict__:
            yield from ((clean_fqn(name), module, injection) for injection in injections_of(module))


def adapted_layers(root: nn.Module, injection: Injection) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of one injection."""
    modules = modules_by_name(root)
    for name in injection.targets:
        layer = modules[name]
        assert isinstance(layer, LoraLayer)
        yield name, layer


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that no injection trains, under each of their names."""
    trained = {id(p) for _, _, injection in injections(model) for p in injection.trained.values()}
    trained |= {id(p) for m in model.modules() if isinstance(m, LoraLayer) for p in m.lora.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [(name, parameter) for name, parameter in named if id(parameter) not in trained]


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model under each of their clean names."""
    return {clean_fqn(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
