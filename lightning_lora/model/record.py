"""What an injection did to a model: the record by which it is found, switched and taken out."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import clean_fqn, is_submodule
from lightning_lora.layers import LoraLayer
from lightning_lora.model.targets import modules_by_name
from lightning_lora.sharding import shard_of, swap_parameters

_ATTRIBUTE = "_lora_injections"


class Injection:
    """What one injection did to a model.

    It holds no module of the model, so that it outlives none. What was taken out of the model is held here and nowhere
    else, and :meth:`switch` exchanges it.

    Args:
        root: The module that it is made on. All names are those in this module.
        config: The settings.
        adapter_name: Name of the adapter.
        saved: Names of the modules that are trained in full.

    Attributes:
        trained: Names of the parameters that are trained in full.
        aside: By name, what is not in the model now, of the parameters and buffers that the base and this adapter both
            have values of: those trained in full, and the weights that PiSSA, OLoRA or LoftQ replaced by a residual.
        in_place: Whether the model has the adapter's own values of these now, and the base's are aside.
        frozen: Names of the base parameters that were trainable before.
        frozen_norms: The normalization layers whose statistics are frozen.
        fused: The switches of torch's fused encoder path that were on, as module, name and value.
        fingerprint: Of the base, once it is known.
        from_data: Whether the adapter's initialization was computed from data.
        beneath: Name and settings of the adapters that were merged into this one's base before, in plain types.
    """

    def __init__(self, root: nn.Module, config: LoraConfig, adapter_name: str, saved: Iterable[str] = ()) -> None:
        self.config = config
        self.adapter_name = adapter_name
        self.saved = list(saved)
        self.trained: list[str] = []
        self.aside: dict[str, Tensor] = {}
        self.in_place = True
        self.frozen: list[str] = []
        self.frozen_norms: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.fused: list[tuple[weakref.ref[nn.Module], str, Any]] = []
        self.fingerprint: Any = None
        self.from_data = False
        self.beneath: list[dict[str, Any]] = []
        self._root = weakref.ref(root)
        self._layers: dict[str, weakref.ref[nn.Module]] = {}

    @property
    def root(self) -> nn.Module:
        """The module that it was made on."""
        root = self._root()
        assert root is not None  # whoever found this record found it on its root
        return root

    @property
    def targets(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self._layers)

    def add_layers(self, layers: dict[str, LoraLayer]) -> None:
        """Note the adapted layers, by name."""
        self._layers.update((name, weakref.ref(layer)) for name, layer in layers.items())

    def layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """The adapted layers, by name, as far as they still are."""
        for name, found in self._layers.items():
            if isinstance(layer := found(), LoraLayer):
                yield name, layer

    def gone(self) -> list[str]:
        """Names of the adapted layers that are no more, since something else was put in their place."""
        return [name for name, found in self._layers.items() if found() is None]

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name, as it is in the model now."""
        module, attribute = self._place(name)
        found: Tensor = getattr(module, attribute)
        return found

    def saves(self, name: str) -> bool:
        """Whether a module, parameter or buffer belongs to a module that is trained in full."""
        return any(is_submodule(name, saved) for saved in self.saved)

    def as_beneath(self) -> list[dict[str, Any]]:
        """What :attr:`beneath` is to say of an adapter that is put over this one, once this is merged for good."""
        return [*self.beneath, {"adapter_name": self.adapter_name, "config": self.config.to_dict()}]

    def put_aside(self, name: str, other: Tensor) -> None:
        """Put the adapter's own parameter or values in the place of the base's, which are kept."""
        self.aside[name] = swap_parameters(*self._place(name), other)

    def switch(self, in_place: bool) -> None:
        """Have the model show the adapter's own values of what both have, or the base's."""
        if in_place == self.in_place:
            return
        swapped: dict[int, Tensor] = {}
        for name, other in self.aside.items():
            module, attribute = self._place(name)
            here = id(getattr(module, attribute))
            if here not in swapped or isinstance(other, nn.Parameter):  # values of what is tied change once
                swapped[here] = swap_parameters(module, attribute, other)
            self.aside[name] = swapped[here]
        self.in_place = in_place
        for name in self.trained:
            self.tensor(name).requires_grad_(in_place)

    def shard_aside(self) -> None:
        """Keep aside only what this process holds, once a strategy has sharded the model."""
        self.aside = {name: shard_of(*self._place(name), other) for name, other in self.aside.items()}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        module_name, _, attribute = name.rpartition(".")
        return modules_by_name(self.root)[module_name], attribute

    # A copy or an unpickled model has a record of its own, with its own modules in it.
    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_root": self._root(),
            "_layers": {name: layer() for name, layer in self._layers.items()},
            "frozen_norms": list(self.frozen_norms),
            "fused": [(module(), name, value) for module, name, value in self.fused],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._root = weakref.ref(state["_root"])
        self._layers = {name: weakref.ref(layer) for name, layer in state["_layers"].items()}
        self.frozen_norms = weakref.WeakSet(state["frozen_norms"])
        self.fused = [(weakref.ref(module), name, value) for module, name, value in state["fused"]]


def keep_record(injection: Injection) -> None:
    """Keep the record of an injection on its root."""
    injection.root.__dict__.setdefault(_ATTRIBUTE, []).append(injection)


def drop_record(injection: Injection) -> None:
    """Forget an injection."""
    others = injections_of(injection.root)
    others.remove(injection)
    if not others:
        injection.root.__dict__.pop(_ATTRIBUTE, None)


def injections_of(model: nn.Module) -> list[Injection]:
    """What was injected with this very module as the root."""
    found: list[Injection] = model.__dict__.get(_ATTRIBUTE, [])
    return found


def named_injections(model: nn.Module) -> Iterator[tuple[str, Injection]]:
    """All injections in a model, with the name of the module on which each was made."""
    for name, module in model.named_modules():
        if _ATTRIBUTE in module.__dict__:
            yield from ((clean_fqn(name), injection) for injection in injections_of(module))


def injections(model: nn.Module) -> list[Injection]:
    """All injections in a model."""
    return [injection for _, injection in named_injections(model)]


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that no injection trains, under each of their names."""
    trained = {id(found.tensor(name)) for found in injections(model) if found.in_place for name in found.trained}
    trained |= {id(p) for m in model.modules() if isinstance(m, LoraLayer) for p in m.lora.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [(name, parameter) for name, parameter in named if id(parameter) not in trained]


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model under each of their clean names."""
    return {clean_fqn(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
