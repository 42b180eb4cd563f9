"""What every adapted layer shares: the class that a base layer takes on while it is adapted."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.functional import add_low_rank_by_sample
from lightning_lora.layers.seal import Seal
from lightning_lora.sharding import shard_of, swap_parameters, unsharded, unwrap_fsdp


@dataclasses.dataclass(frozen=True)
class Target:
    """A module to adapt.

    Attributes:
        name: Its qualified name.
        module: The module.
        parent: The module that it is an attribute of, ``None`` for the root.
        layer_class: The class that it takes on.
        parameters: Names of the parameters that are adapted, relative to the module.
        tokens: Indices of the rows that are trained in full, where it is not the whole parameter.
        tied_to: Name of the target whose adapter it shares, as it shares its weight.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None
    layer_class: "type[LoraLayer]"
    parameters: tuple[str, ...] = ("weight",)
    tokens: tuple[int, ...] = ()
    tied_to: str | None = None


class Rows(NamedTuple):
    """Which adapter each sample of a batch has.

    Attributes:
        choice: For each sample, the index of its adapter in ``samples``, or their number for none.
        samples: By adapter, the indices of its samples.
    """

    choice: Tensor
    samples: dict[str, Tensor]


class LoraLayer(nn.Module):
    """A base layer with adapters: the class that the layer takes on while it is adapted.

    Adapting changes the layer's class in place, so the layer keeps its identity: its parameters and their names, its
    hooks, and every reference that other modules hold to it. Taking the adapters out gives the class back.
    """

    adapter_class: ClassVar[type[Adapter]]  # its plain kind of adapter, "lora"
    has_one_kind: ClassVar[bool] = False  # whatever kind the settings ask for
    supported: ClassVar[str] = ""  # the modules that it adapts, for errors
    is_linear: ClassVar[bool] = True  # one that "all-linear" means

    lora: nn.ModuleDict
    weight: nn.Parameter
    # What forward looks at is replaced and never changed in place, so that compiled code has guards on it.
    _active: tuple[str, ...]  # names of the active adapters
    _merged: bool  # whether they are merged into the weights
    _aside: dict[str, Tensor]  # meanwhile, by name, the base's own parameters or their values
    _seals: dict[str, Seal]  # by the same names, seals on the merged ones
    _rows: "Rows | None"  # for a batch of several adapters' samples

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Whether it is for modules of this class; never, if settings and not classes choose its modules."""
        return False

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters that are adapted in this very module."""
        return ("weight",)

    @classmethod
    def new_adapter(
        cls, adapter_class: type[Adapter], target: Target, config: LoraConfig, adapter_name: str
    ) -> nn.Module:
        """An adapter for one module, ready to be put in."""
        make: Any = adapter_class
        adapter: nn.Module = make(target.module.weight, config, target.name, adapter_name)
        return adapter

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        """Why this very module cannot be adapted as the config asks, ``None`` if it can."""
        if "weight" not in target.module._parameters:
            return "its weight is computed of others (a parametrization), so nothing can be folded into it"
        if config.needs_matrix and not getattr(cls.adapter_class, "is_matrix", False):
            return f"init_lora_weights={config.init_lora_weights!r} is not for this kind of layer"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(x, *args, **kwargs)
        if self._rows is not None:
            return self._add_by_sample(x, out, self._rows)
        if not self._merged:
            for name in self._active:
                out = self.lora[name](x, out, self)
        return out

    def _add_by_sample(self, x: Tensor, out: Tensor, rows: "Rows") -> Tensor:
        """Add to each sample's output the path of its own adapter, all samples of one adapter at once."""
        samples = len(rows.choice)
        present = {name: chosen for name, chosen in rows.samples.items() if name in self.lora}
        adapters: list[Any] = [self.lora[name] for name in present]
        if adapters and len(x) == samples and all(adapter.is_plain_lora() for adapter in adapters):
            factors = [(adapter.lora_A, adapter.scaling * adapter.lora_B) for adapter in adapters]
            here = {name: position for position, name in enumerate(present)}
            places = torch.tensor([*(here.get(name, len(here)) for name in rows.samples), len(here)], device=x.device)
            return add_low_rank_by_sample(out, x, factors, places[rows.choice.to(x.device)])
        for name, chosen in present.items():
            index = _rows_of(chosen.to(x.device), samples, len(x))
            out = out.index_copy(0, index, self.lora[name](x[index], out[index], self))
        return out

    def adapters_on(self, parameter: str) -> Sequence[Adapter]:
        """The active adapters of one of the parameters."""
        return [self.adapter(name) for name in self._active]  # type: ignore[misc]

    def adapter(self, name: str) -> nn.Module:
        """The adapter without its FSDP wrapper.

        For reading only: forward must call ``self.lora[name]``, so that FSDP's hooks run.
        """
        return unwrap_fsdp(self.lora[name])

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """The adapted parameters, as they are now, by name."""
        return {"weight": self.weight}

    def parts(self, adapter_name: str) -> Sequence[Adapter]:
        """All that one adapter has in this layer."""
        return [self.adapter(adapter_name)]  # type: ignore[list-item]

    def peft_targets(self, name: str) -> dict[str, list[str]]:
        """What PEFT's config lists of this layer, whose name is given: by the setting, names."""
        return {"target_modules": [name]}

    def peft_adapters(self, adapter_name: str) -> Mapping[str, Adapter]:
        """One adapter's parts, by what PEFT adds to the layer's name for each."""
        return {"": self.adapter(adapter_name)}  # type: ignore[dict-item]

    def peft_wrapped(self) -> dict[str, str]:
        """What PEFT adds to the names of the modules that it wraps here, beside what they are called by now."""
        return {"": ".base_layer"}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters."""
        return self._active

    @active.setter
    def active(self, names: Iterable[str]) -> None:
        self.__dict__["_active"] = tuple(names)

    @property
    def merged(self) -> bool:
        """Whether the active adapters are merged into the weights."""
        return self._merged

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """By name, the parameters with all active adapters merged in, each rounded once to the parameter's dtype.

        Of a parameter that processes share, each gets its shard.

        Raises:
            ValueError: If one holds a NaN or an infinity.
        """
        merged = {}
        with unsharded(self.modules()):
            for name, parameter in self.adapted_parameters().items():
                total = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
                for adapter in self.adapters_on(name):
                    total = adapter.fold(total)
                merged[name] = total.to(parameter.dtype)
                if merged[name] is parameter:  # no adapter is active
                    merged[name] = parameter.detach().clone()
                if not is_finite(merged[name]):
                    raise ValueError(
                        f"Folding the adapter into a {type(self).__name__} of {parameter.dtype} gives a NaN or an "
                        "infinity: the adapter has diverged, or the weight's dtype is too narrow. Nothing was "
                        "changed. Take an earlier checkpoint, or merge in float32."
                    )
        return {name: shard_of(self, name, tensor) for name, tensor in merged.items()}

    def merge(self, merged_weights: Mapping[str, Tensor]) -> None:
        """Put merged parameters, or values of them, in the place of the base's, which :meth:`unmerge` puts back."""
        for name, merged in merged_weights.items():
            self._aside[name] = swap_parameters(self, name, merged)
            self._seals[name] = Seal(self._parameter(name))
        self.__dict__["_merged"] = True

    def merge_like(self, other: "LoraLayer") -> None:
        """Be merged by what was done to another layer, with which this one shares adapters and parameters."""
        self.__dict__.update(_aside=other._aside, _seals=other._seals, _merged=True)

    def unmerge(self) -> None:
        """Put the base's parameters back, bit for bit."""
        for name, base_weight in self._aside.items():
            swap_parameters(self, name, base_weight)
        self.forget_base()

    def forget_base(self) -> None:
        """Take the weights as they are now for the base's."""
        self._aside.clear()  # which layers that are merged like this one share
        self._seals.clear()
        self.__dict__.update(_aside={}, _seals={}, _merged=False)

    def is_as_merged(self) -> bool:
        """Whether the weights are still those that :meth:`merge` put there."""
        return all(seal.fits(self._parameter(name)) for name, seal in self._seals.items())

    def _parameter(self, name: str) -> Tensor:
        owner_name, _, attribute = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(owner_name), attribute)
        return found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("lora."):
            raise RuntimeError(
                f"An adapted layer cannot be cut up by parallelize_module, which takes {name!r} for a parameter of its "
                "own: call parallelize_module first, then inject, then fully_shard."
            )
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy must find it by the base class.
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return (_new_adapted, _adapted(self).__bases__, *state)


def rows_of(adapter_names: Sequence[str | None], names: Sequence[str]) -> Rows:
    """Which adapter each sample has, given the name of each sample's adapter and all of these names once."""
    index = {name: position for position, name in enumerate(names)}
    choice = torch.tensor([len(index) if name is None else index[name] for name in adapter_names], dtype=torch.long)
    samples = {name: (choice == position).nonzero().flatten() for name, position in index.items()}
    return Rows(choice, samples)


def _rows_of(samples: Tensor, count: int, rows: int) -> Tensor:
    """The rows of given samples in a tensor whose rows are ``count`` samples, or several in a row for each of them."""
    each, rest = divmod(rows, count)
    if rest:
        raise ValueError(
            f"adapters_for names the adapters of {count} samples, but a layer got an input of {rows} rows: give one "
            "name for each sample of the batch (None for the base alone)."
        )
    return (samples.unsqueeze(1) * each + torch.arange(each, device=samples.device)).flatten()


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, in one pass and without the temporaries of ``torch.isfinite``."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@cache
def adapted_class(layer_class: type[LoraLayer], base: type[nn.Module]) -> type[LoraLayer]:
    """The class of a ``base`` module that is adapted as a ``layer_class``."""
    names = {"__module__": layer_class.__module__, "_is_adapted": True}
    return type(f"Lora{base.__name__}", (layer_class, base), names)


def base_class(layer: LoraLayer) -> type[nn.Module]:
    """The class that an adapted layer had before."""
    return _adapted(layer).__bases__[1]


def class_without_adapter(layer: LoraLayer) -> type[nn.Module]:
    """The class for a layer to go back to: the one before, with what was made of it since by sharding the layer."""
    own, adapted = type(layer), _adapted(layer)
    if own is adapted:
        return base_class(layer)
    bases = tuple(base_class(layer) if base is adapted else base for base in own.__bases__)
    return type(own.__name__.replace(adapted.__name__, bases[-1].__name__), bases, {"__module__": own.__module__})


def _adapted(layer: LoraLayer) -> type[nn.Module]:
    return next(cls for cls in type(layer).__mro__ if "_is_adapted" in vars(cls))


def _new_adapted(layer_class: type[LoraLayer], base: type[nn.Module]) -> LoraLayer:
    cls = adapted_class(layer_class, base)  # type: ignore[arg-type]
    return cls.__new__(cls)
