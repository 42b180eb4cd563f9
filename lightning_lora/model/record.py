"""What an injection did to a model: the record by which it is found, switched and taken out."""

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import base_modules, clean_fqn, is_submodule
from lightning_lora.layers import LoraLayer
from lightning_lora.model.targets import modules_by_name
from lightning_lora.sharding import note_units, shard_of, swap_parameters

_ATTRIBUTE = "_lora_injections"
_ON_LAYERS = "_injections"


class Injection:
    """What one injection did to a model.

    It lies on its root and on each adapted layer, and holds no module of the model, so that it keeps none alive. It is
    copied and pickled without them, too: a copy finds its own by their names. What was taken out of the model is held
    here and nowhere else, and :meth:`switch` exchanges it.

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
        frozen_norms: Names of the normalization layers whose statistics are frozen.
        fused: The switches of torch's fused encoder path that were on, as the module's name, theirs and the value.
        fingerprint: Of the base, once it is known.
        quantization: How the base's weights are quantized: each format in plain types, with the number of its layers.
        from_data: Whether the adapter's initialization was computed from data.
        beneath: Name and settings of the adapters that were merged into this one's base before, in plain types.
        runs: Names of the runs that have trained it, the latest last, by which a checkpoint tells whose it is.
        is_found: Whether the root is only where the layers were found, after the one that it was made on was gone.
        is_part: Whether some of what it trained in full was left behind, when its layers went to another root.
    """

    def __init__(self, root: nn.Module, config: LoraConfig, adapter_name: str, saved: Iterable[str] = ()) -> None:
        self.config = config
        self.adapter_name = adapter_name
        self.saved = list(saved)
        self.trained: list[str] = []
        self.aside: dict[str, Tensor] = {}
        self.in_place = True
        self.frozen: list[str] = []
        self.frozen_norms: list[str] = []
        self.fused: list[tuple[str, str, Any]] = []
        self.fingerprint: Any = None
        self.quantization: list[dict[str, Any]] = []
        self.from_data = False
        self.beneath: list[dict[str, Any]] = []
        self.runs: list[str] = []
        self.is_found = False
        self.is_part = False
        self._root: weakref.ref[nn.Module] | None = weakref.ref(root)
        self._layers: dict[str, weakref.ref[nn.Module] | None] = {}
        self._owners: dict[str, weakref.ref[nn.Module]] = {}  # of what is aside

    @property
    def root(self) -> nn.Module:
        """The module that it was made on."""
        root = self.living_root()
        assert root is not None  # whoever found this record found it on its root, or gave it another
        return root

    def living_root(self) -> nn.Module | None:
        """The same, ``None`` once that is gone, or in a copy that was not looked for yet."""
        return None if self._root is None else self._root()

    @property
    def peft(self) -> dict[str, dict[str, Any]] | None:
        """The settings of each adapter by its name in PEFT, in plain types, if PEFT has wrapped the root."""
        return None

    @property
    def targets(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self._layers)

    def add_layers(self, layers: dict[str, LoraLayer]) -> None:
        """Note the adapted layers, by name."""
        for name, layer in layers.items():
            self._layers[name] = weakref.ref(layer)
            layer.__dict__.setdefault(_ON_LAYERS, {})[self] = name

    def layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """The adapted layers that are there still, by name."""
        for name, found in self._layers.items():
            layer = found and found()
            if isinstance(layer, LoraLayer):
                yield name, layer

    def forget_layers(self) -> None:
        """Leave no note on the layers."""
        for _, layer in self.layers():
            _noted_on(layer).pop(self, None)

    def settle(self, root: nn.Module) -> None:
        """In a copy, find the copied modules."""
        modules = modules_by_name(root)
        self._root = weakref.ref(root)
        self._layers = {name: weakref.ref(modules[name]) for name in self._layers if name in modules}
        self._owners = {name: weakref.ref(modules[name]) for name in map(_owner, self.aside) if name in modules}

    def move(self, root: nn.Module, layers: list[tuple[str, LoraLayer, str]]) -> None:
        """Have another root; what lies outside of it is forgotten.

        Args:
            root: The root.
            layers: The layers, each between its names there and in the root before.
        """
        modules = modules_by_name(root)
        there = {*modules, *_tensor_names(root)}
        prefixes = sorted({_prefixes(old, new) for new, _, old in layers}, key=lambda pair: -len(pair[0]))
        common = common_module([old for _, _, old in layers])

        def renamed(name: str) -> str | None:
            inside = [(old, new) for old, new in prefixes if is_submodule(name, old)]
            names = [f"{new}.{name[len(old) :].lstrip('.')}".strip(".") for old, new in inside]
            return next((found for found in names if found in there), None)

        def is_same(name: str) -> bool:
            """Whether a tensor is in the new root, and not one that has its name only."""
            new, owner = renamed(name), self._owners.get(_owner(name))
            if new is None or owner is None:
                return new is not None and is_submodule(name, common)
            return owner() is modules.get(_owner(new))

        def kept(names: Iterable[str]) -> list[str]:
            return [found for found in map(renamed, names) if found is not None]

        trained = [name for name in self.trained if is_same(name)]
        self.is_part |= len(trained) < len(self.trained)
        self.saved = kept(saved for saved in self.saved if any(is_submodule(name, saved) for name in trained))
        self.trained = kept(trained)
        self.frozen, self.frozen_norms = kept(self.frozen), kept(self.frozen_norms)
        self.aside = {str(renamed(name)): tensor for name, tensor in self.aside.items() if is_same(name)}
        switches = ((renamed(name), *rest) for name, *rest in self.fused)
        self.fused = [(name, *rest) for name, *rest in switches if name is not None]
        self.fingerprint = None  # which names are a part of
        self._layers = {name: weakref.ref(layer) for name, layer, _ in layers}
        self.settle(root)

    def seen_from(self, model: nn.Module) -> "Injection":
        """This injection with the names that all has in a module that holds its layers, to be read and not changed."""
        root = self.living_root()
        if root is not None and is_in(root, model):
            return self
        view = copy.copy(self)
        view._owners = self._owners
        view.move(model, _layers_of(self, model))
        return view

    def gone(self) -> list[str]:
        """Names of the adapted layers that are no more, since something else was put in their place."""
        return [name for name, found in self._layers.items() if found is None or found() is None]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters and buffers of these names, as they are in the model now."""
        return {name: getattr(module, attribute) for name, module, attribute in self._places(names)}

    def saves(self, name: str) -> bool:
        """Whether a module, parameter or buffer belongs to a module that is trained in full."""
        return any(is_submodule(name, saved) for saved in self.saved)

    def own_names(self) -> list[str]:
        """Names of the parameters and buffers that it trains in full, if they are in the model now."""
        if not self.in_place:
            return []
        return [*self.trained, *(name for name in self.aside if self.saves(name) and name not in self.trained)]

    def parameters(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """The parameters of the adapters in each layer, by its name."""
        for name, layer in self.layers():
            yield name, list(layer.lora.parameters())

    def as_beneath(self) -> list[dict[str, Any]]:
        """What :attr:`beneath` is to say of an adapter that is put over this one, once this is merged for good."""
        return [*self.beneath, {"adapter_name": self.adapter_name, "config": self.config.to_dict()}]

    def put_aside(self, others: Mapping[str, Tensor]) -> None:
        """Put the adapter's own parameters, or values of them, in the place of the base's, which are kept."""
        self.aside.update(self._swap(others))
        self._owners.update((_owner(name), weakref.ref(module)) for name, module, _ in self._places(others))

    def switch(self, in_place: bool) -> None:
        """Have the model show the adapter's own values of what both have, or the base's."""
        if in_place == self.in_place:
            return
        self.aside = self._swap(self.aside)
        self.in_place = in_place
        for tensor in self.tensors(self.trained).values():
            tensor.requires_grad_(in_place)

    def shard_aside(self) -> None:
        """Keep aside only what this process holds, once a strategy has sharded the model."""
        places = self._places(self.aside)
        self.aside = {name: shard_of(module, attribute, self.aside[name]) for name, module, attribute in places}

    def _swap(self, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put others in the place of what is in the model, and return that."""
        swapped: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, module, attribute in self._places(others):
            other, here = others[name], id(getattr(module, attribute))
            if here not in swapped or isinstance(other, nn.Parameter):  # values of what is tied change once
                swapped[here] = swap_parameters(module, attribute, other)
            found[name] = swapped[here]
        return found

    def _places(self, names: Iterable[str]) -> list[tuple[str, nn.Module, str]]:
        """Names of parameters and buffers, each with its module and its name there."""
        if not names:
            return []
        # A module may have several names, and all of them count here.
        modules = {clean_fqn(name): module for name, module in base_modules(self.root, False)}
        return [(name, modules[_owner(name)], name.rpartition(".")[2]) for name in names]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None, "_layers": dict.fromkeys(self._layers), "_owners": {}}


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """What is before the longest end that two dotted names share."""
    olds, news = old.split("."), new.split(".")
    while olds and news and olds[-1] == news[-1]:
        olds.pop()
        news.pop()
    return ".".join(olds), ".".join(news)


def common_module(names: list[str]) -> str:
    """The name of the innermost module that all of these are in."""
    parts = zip(*(name.split(".")[:-1] for name in names))
    return ".".join(found[0] for found in itertools.takewhile(lambda part: len(set(part)) == 1, parts))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _tensor_names(root: nn.Module) -> Iterator[str]:
    """The clean names of all parameters and buffers, each of them."""
    for name, module in root.named_modules(remove_duplicate=False):
        own = (*module._parameters.items(), *module._buffers.items())  # all that TorchScript's have of a dict
        yield from (clean_fqn(f"{name}.{inner}".lstrip(".")) for inner, _ in own)


def injections_on(layer: nn.Module) -> list[Injection]:
    """The injections that an adapted layer has adapters of."""
    return list(_noted_on(layer))


def _noted_on(layer: nn.Module) -> dict[Injection, str]:
    """The injections of an adapted layer, with the name that it has in the root of each."""
    found: dict[Injection, str] = layer.__dict__.get(_ON_LAYERS, {})
    return found


def keep_record(injection: Injection) -> None:
    """Keep the record of an injection on its root."""
    injection.root.__dict__.setdefault(_ATTRIBUTE, []).append(injection)


def drop_record(injection: Injection) -> None:
    """Forget an injection."""
    injection.forget_layers()
    _take_from_root(injection)


def _take_from_root(injection: Injection) -> None:
    root = injection.living_root()
    others: list[Injection] = [] if root is None else root.__dict__.get(_ATTRIBUTE, [])
    if injection in others:
        others.remove(injection)
    if root is not None and not others:
        root.__dict__.pop(_ATTRIBUTE, None)


def injections_of(model: nn.Module) -> list[Injection]:
    """What was injected with this very module as the root."""
    found: list[Injection] = model.__dict__.get(_ATTRIBUTE, [])
    for injection in [each for each in found if each._root is None or each._root() is None]:
        injection.settle(model)
    return found


def roots_of(found: Iterable[Injection]) -> list[nn.Module]:
    """The roots of injections, each once."""
    references = {each._root for each in found if each._root is not None}
    return list({id(root): root for root in [reference() for reference in references] if root is not None}.values())


def named_injections(model: nn.Module) -> Iterator[tuple[str, Injection]]:
    """All injections in a model, with the name of the module on which each was made, to be read and not changed.

    Those that were made on a module around this one have here the names of this one; see :func:`injections`.
    """
    here, around = _find(model)
    yield from here
    yield from (("", injection.seen_from(model)) for injection in around)


def injections(model: nn.Module) -> list[Injection]:
    """All injections in a model.

    Where the layers of one are in this model and its root is not, the root may be gone, as a LightningModule that was
    made for one run is: then the injection has this model for its root from now on. A root that lives, such as that
    LightningModule during the run, stays the root, and the injection is one of this model too if all its layers are.
    """
    here, around = _find(model)
    return [injection for _, injection in here] + around


def own_injections(model: nn.Module) -> list[Injection]:
    """The injections in a model that are not PEFT's.

    Raises:
        ValueError: If there are PEFT's alone.
    """
    found = injections(model)
    own = [injection for injection in found if injection.peft is None]
    if found and not own:
        raise ValueError(
            f"The adapters in this {type(model).__name__} are PEFT's, which has functions of its own for this: "
            "set_adapter, disable_adapter, merge_and_unload and so on. Nothing was changed."
        )
    return own


def broken_injections(model: nn.Module) -> list[Injection]:
    """The injections of which some layers are in a model, and others elsewhere."""
    return [
        injection
        for injection in _strays(base_modules(model))
        if not _is_whole(injection, _layers_of(injection, model))
    ]


def adopt(model: nn.Module) -> None:
    """Be the root of injections whose layers are all in this model, unless they were made on one in or around it."""
    modules = list(base_modules(model))
    for injection in _strays(modules):
        root = injection.living_root()
        if _is_whole(injection, _layers_of(injection, model)) and (root is None or not is_in(model, root)):
            _move(injection, model)
            injection.is_found = False
    for _, module in modules:
        for injection in list(injections_of(module)):
            if injection.is_found:
                _move(injection, model)
                injection.is_found = False


def _find(model: nn.Module) -> tuple[list[tuple[str, Injection]], list[Injection]]:
    """The injections with their root in a model, by its name, and those with a root around it."""
    note_units(model)
    modules = list(base_modules(model))
    strays = _strays(modules)  # first, so that those without a root get one
    for injection in strays:
        if injection.living_root() is None and _is_whole(injection, _layers_of(injection, model)):
            _move(injection, model)
    here: list[tuple[str, Injection]] = []
    for name, module in modules:
        if _ATTRIBUTE in module.__dict__:
            clean = clean_fqn(name)
            here += [(clean, injection) for injection in injections_of(module)]
    around = [
        injection
        for injection in strays
        if injection.living_root() is not model and _is_whole(injection, _layers_of(injection, model))
    ]
    return here, around


def _strays(modules: Iterable[tuple[str, nn.Module]]) -> list[Injection]:
    """The injections of the layers among a model's modules whose roots are not among them."""
    noted: dict[Injection, None] = {}
    rooted: set[Injection] = set()
    modules = list(modules)
    for _, module in modules:
        if _ATTRIBUTE in module.__dict__:
            rooted.update(injections_of(module))
    for _, module in modules:
        if isinstance(module, LoraLayer) and not _noted_on(module).keys() <= rooted:
            noted.update((injection, None) for injection in _noted_on(module) if injection not in rooted)
    return list(noted)


def _layers_of(injection: Injection, model: nn.Module) -> list[tuple[str, LoraLayer, str]]:
    """The layers of an injection in a model, with their names there and in its root, in the order that it has them."""
    found = [
        (clean_fqn(name), module, _noted_on(module)[injection])
        for name, module in base_modules(model)
        if isinstance(module, LoraLayer) and injection in _noted_on(module)
    ]
    order = {name: position for position, name in enumerate(injection.targets)}
    return sorted(found, key=lambda each: order.get(each[2], 0))


def _is_whole(injection: Injection, found: list[tuple[str, LoraLayer, str]]) -> bool:
    here = {id(layer) for _, layer, _ in found}
    return bool(here) and all(id(layer) in here for _, layer in injection.layers())


def is_in(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module is another one or a part of it."""
    return any(module is inner for _, inner in base_modules(model))


def _move(injection: Injection, root: nn.Module) -> None:
    _take_from_root(injection)
    give_root(injection, root)
    keep_record(injection)


def give_root(injection: Injection, root: nn.Module) -> None:
    """Have a module that holds the layers of an injection be its root; the caller keeps the record there."""
    layers = _layers_of(injection, root)
    injection.move(root, layers)
    injection.is_found = True
    injection.forget_layers()
    injection.add_layers({name: layer for name, layer, _ in layers})


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that no injection trains, under each of their names."""
    in_place = (found for found in injections(model) if found.in_place)
    trained = {id(tensor) for found in in_place for tensor in found.tensors(found.trained).values()}
    return [(name, parameter) for name, parameter in _base_parameters(model) if id(parameter) not in trained]


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in base_modules(model, False):
        for inner, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{inner}".lstrip("."), parameter


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model but adapters' under each of their clean names."""
    return {clean_fqn(name): parameter for name, parameter in _base_parameters(model)}


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """The adapted layers in a model."""
    return [module for _, module in base_modules(model) if isinstance(module, LoraLayer)]
