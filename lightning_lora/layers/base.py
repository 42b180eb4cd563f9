"""What every adapted layer shares: the adapter module, and the class that a base layer takes on while adapted."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.functional import add_low_rank_by_sample
from lightning_lora.layers.init import fill_
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


class Adapter(nn.Module):
    """The trained tensors of one adapter, and how they go into the base weight and into PEFT's files."""

    peft_names: ClassVar[dict[str, str]]

    layer_name: str

    def fold(self, weight: Tensor) -> Tensor:
        """The base weight, in float32 or better, with this adapter in it."""
        raise NotImplementedError

    def peft_tensors(self) -> dict[str, Tensor]:
        """The trained tensors as PEFT names and shapes them."""
        return {peft_name: getattr(self, attribute) for attribute, peft_name in self.peft_names.items()}

    def from_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """By attribute, the trained tensors of what :meth:`peft_tensors` gave, here or in PEFT.

        Raises:
            ValueError: If this adapter cannot hold what they compute.
        """
        return {attribute: tensors[peft_name] for attribute, peft_name in self.peft_names.items()}

    def is_plain_lora(self) -> bool:
        """Whether it adds ``scaling * B A`` of the input to the output and nothing else."""
        return False

    def plain_tensors(self) -> dict[str, Tensor]:
        """The same for the base weight as it was before; a plain LoRA has ``rank_factor`` times the rank then."""
        return self.peft_tensors()


class LoraAdapter(Adapter):
    """The trained matrices of one adapter on one parameter, a module of its own.

    It is a module, and its forward computes the whole low-rank path, so that strategies which shard or gather by
    module can treat the few trained parameters apart from the frozen weight beside them.

    Args:
        weight: The parameter to adapt, whose device the adapter shares. Half-precision bases get float32 adapters,
            since small updates would be lost in half precision; a ``"bf16-true"`` Trainer still casts them.
        config: Rank, scaling, dropout and initial values.
        layer_name: Qualified name of the layer, for patterns and for the seed.
        adapter_name: Name of the adapter, for the seed.
        layout: Attributes that this class of adapter needs to know its shapes.
    """

    peft_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    # Whether A and B are factors of one matrix, which some starts need.
    is_matrix: ClassVar[bool] = False
    out_dim: ClassVar[int] = 0  # the dimension of the base weight that counts outputs
    rank_dim: ClassVar[int] = 1  # the dimension of B that counts rank components
    random_factor: ClassVar[str] = "lora_A"  # the factor that starts at random, while the other starts at zero
    rank_factor: int = 1  # the rank of the exported adapter over this one's

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, weight: Tensor, config: LoraConfig, layer_name: str, adapter_name: str, **layout: Any) -> None:
        super().__init__()
        for name, value in layout.items():
            setattr(self, name, value)
        self.r = config.rank(layer_name)
        self.scaling = config.scaling(layer_name)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.rank_dropout = config.rank_dropout
        self.d_initial = config.vera_d_initial
        self._init = config.init_lora_weights
        self._seed = config.seed
        self.layer_name = layer_name
        self._qualified_name = f"{layer_name}.{adapter_name}"
        self.make_parameters(weight)
        if config.freeze_A:
            self.get_parameter(self.random_factor).requires_grad_(False)
        self.reset_parameters()

    def make_parameters(self, weight: Tensor) -> None:
        """Make the trained tensors, without values."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape_A, shape_B = self.shapes(weight)
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(shape_B, dtype=dtype, device=weight.device))

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for this parameter."""
        raise NotImplementedError

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        """Add the low-rank path of the layer's input ``x`` to the base layer's output ``out``."""
        return self.add_path(self.dropout(x), out, layer, self.drop_ranks(self.lora_B, self.rank_dim))

    def drop_ranks(self, factor: Tensor, dim: int) -> Tensor:
        """While training with ``rank_dropout``, zero whole rank components and scale up the others.

        Args:
            factor: A tensor that the update is linear in; one is enough, and B costs nothing of the input's size.
            dim: Its dimension that counts the components.
        """
        if not (self.training and self.rank_dropout):
            return factor
        keep = nn.functional.dropout(factor.new_ones(factor.shape[dim]), self.rank_dropout)
        shape = [1] * factor.dim()
        shape[dim] = len(keep)
        return factor * keep.view(shape)

    def add_path(self, x: Tensor, out: Tensor, layer: nn.Module, lora_B: Tensor) -> Tensor:
        """Add the path of A and the given B to ``out``."""
        raise NotImplementedError

    def base_product(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The base layer's output for ``x``, without its bias."""
        raise NotImplementedError

    def rows(self, weight: Tensor) -> Tensor:
        """The base weight, or one in its layout, as a matrix with a row for each output; a view."""
        return weight.movedim(self.out_dim, 0).flatten(1)

    def delta_weight(self) -> Tensor:
        """The update of the base weight, in the base weight's layout, in float32 or better."""
        raise NotImplementedError

    def fold(self, weight: Tensor) -> Tensor:
        return weight + self.delta_weight()

    def reset_parameters(self) -> None:
        """Draw the initial values, the same ones each time."""
        kind_A, kind_B = self.initial_kinds()
        fill_(self.lora_A, kind_A, self._seed, f"{self._qualified_name}.lora_A", self.r)
        fill_(self.lora_B, kind_B, self._seed, f"{self._qualified_name}.lora_B", self.r)

    def initial_kinds(self) -> tuple[str, str]:
        """The distributions that A and B start from; see :func:`~lightning_lora.layers.init.fill_`."""
        return "gaussian" if self._init == "gaussian" else "kaiming", "kaiming" if self._init is False else "zeros"

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class LoraLayer(nn.Module):
    """A base layer with adapters: the class that the layer takes on while it is adapted.

    Adapting changes the layer's class in place, so the layer keeps its identity: its parameters and their names, its
    hooks, and every reference that other modules hold to it. Taking the adapters out gives the class back.
    """

    adapter_class: ClassVar[type[LoraAdapter]]
    dora_class: ClassVar[type[LoraAdapter]]
    vera_class: ClassVar[type[LoraAdapter] | None] = None
    is_linear: ClassVar[bool] = True  # one that "all-linear" means
    is_module_target: ClassVar[bool] = True  # one that target_modules means, not target_parameters
    calls_adapters: ClassVar[bool] = True  # rather than read their tensors

    lora: nn.ModuleDict
    weight: nn.Parameter
    # What forward looks at is replaced and never changed in place, so that compiled code has guards on it.
    _active: tuple[str, ...]  # names of the active adapters
    _merged: bool  # whether they are merged into the weights
    _aside: dict[str, Tensor]  # meanwhile, by name, the base's own parameters or their values
    _seals: dict[str, Seal]  # by the same names, seals on the merged ones
    _rows: dict[str, Tensor] | None  # for a batch of several adapters' samples: by adapter, the samples

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters that are adapted in this very module."""
        return ("weight",)

    @classmethod
    def new_adapter(cls, target: Target, config: LoraConfig, adapter_name: str) -> nn.Module:
        """An adapter for one module, ready to be put in."""
        weight: Tensor = target.module.weight  # type: ignore[assignment]
        return cls.adapter_class_for(config)(weight, config, target.name, adapter_name)

    @classmethod
    def adapter_class_for(cls, config: LoraConfig) -> type[LoraAdapter]:
        """The class of adapter that a config asks for."""
        if config.use_vera and cls.vera_class is not None:
            return cls.vera_class
        return cls.dora_class if config.use_dora else cls.adapter_class

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        """Why this very module cannot be adapted as the config asks, ``None`` if it can."""
        if "weight" not in target.module._parameters:
            return "its weight is computed of others (a parametrization), so nothing can be folded into it"
        if config.use_vera and cls.vera_class is None:
            return "use_vera is for linear layers alone"
        if not cls.adapter_class.is_matrix and config.needs_matrix:
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

    def _add_by_sample(self, x: Tensor, out: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """Add to each sample's output the path of its own adapter, all samples of one adapter at once."""
        samples = sum(map(len, rows.values()))
        present = {name: chosen for name, chosen in rows.items() if name in self.lora}
        adapters: list[Any] = [self.lora[name] for name in present]
        if adapters and len(x) == samples and all(adapter.is_plain_lora() for adapter in adapters):
            factors = [(adapter.lora_A, adapter.scaling * adapter.lora_B) for adapter in adapters]
            return add_low_rank_by_sample(out, x, factors, list(present.values()))
        for name, chosen in present.items():
            index = _rows_of(chosen.to(x.device), samples, len(x))
            out = out.index_copy(0, index, self.lora[name](x[index], out[index], self))
        return out

    def adapters_on(self, parameter: str) -> Sequence[Adapter]:
        """The adapters at work on one of the parameters."""
        return [self.adapter(name) for name in self._active]  # type: ignore[misc]

    def adapter(self, name: str) -> nn.Module:
        """One of its adapters, to be looked at: what a strategy has put around it works only where it is called."""
        return unwrap_fsdp(self.lora[name])

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """The adapted parameters, as they are now, by name."""
        return {"weight": self.weight}

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
        """Put merged parameters, or the values of them, in the place of the base's, which are kept for :meth:`unmerge`."""
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
