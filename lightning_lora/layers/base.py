"""What every adapted layer shares: the class that a base layer takes on while it is adapted."""

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import base_modules
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.folding import folded_by_rows, is_finite, is_foldable
from lightning_lora.layers.functional import add_low_rank_by_sample
from lightning_lora.layers.offloading import Shown, onloaded, swap_offloaded
from lightning_lora.layers.own_forward import has_own_forward, is_hooked
from lightning_lora.layers.readable import is_readable, weightless_reason
from lightning_lora.layers.rows import Rows, input_rows
from lightning_lora.layers.seal import Seal
from lightning_lora.sharding import local_tensor, shard_of, swap_parameters, unsharded, unwrap_fsdp


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


@dataclasses.dataclass(frozen=True)
class MergedForm:
    """What a quantized weight becomes when adapters are merged into it; other weights keep their dtype.

    Attributes:
        dtype: Of an ordinary weight. ``None`` is what it was before it was quantized.
        requantize: Whether it is quantized again instead.
        otherwise: The dtype of an ordinary weight of which it is not known what it was.
    """

    dtype: torch.dtype | None = None
    requantize: bool = False
    otherwise: torch.dtype = torch.float32


class _Calls(threading.local):
    """The layers whose objects' own forwards are running, and whether these have led back to their classes'."""

    def __init__(self) -> None:
        self.led_back: dict[int, bool] = {}


_calls = _Calls()
_STATE = ("_active", "_merged", "_aside", "_seals", "_rows")


class LoraLayer(nn.Module):
    """A base layer with adapters: the class that the layer takes on while it is adapted.

    Adapting changes the layer's class in place, so the layer keeps its identity: its parameters and their names, its
    hooks, and every reference that other modules hold to it. Taking the adapters out gives the class back.
    """

    adapter_class: ClassVar[type[Adapter]]  # its plain kind of adapter, "lora"
    adapters_in: ClassVar[str] = "lora"  # the name of the child that holds the adapters
    has_one_kind: ClassVar[bool] = False  # whatever kind the settings ask for
    supported: ClassVar[str] = ""  # the modules that it adapts, for errors
    group: ClassVar[str] = "linear"  # of config.LAYER_GROUPS, the one by which settings mean it; "" for none
    reads_packed: ClassVar[bool] = False  # whether it can read weights that are quantized
    unadapted: ClassVar[type[nn.Module]]  # the class before; an attribute, which every version of torch can trace
    kinds_like: "ClassVar[type[LoraLayer] | None]" = None  # the kind of layer whose kinds of adapters it can have too

    lora: nn.ModuleDict
    weight: nn.Parameter
    # What forward looks at is replaced and never changed in place, so that compiled code has guards on it.
    _active: tuple[str, ...]  # names of the active adapters
    _merged: bool  # whether they are merged into the weights
    _aside: dict[str, Any]  # meanwhile, by name, the base's own parameters or their values, or parts of packed ones
    _seals: dict[str, Seal]  # by the same names, seals on the merged ones
    _own_forward: Any = None  # what was called in the place of the class's forward, if something was
    _rows: Rows | None  # for a batch of several adapters' samples

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
        weight = cls.weight_for(target.module, adapter_class)
        adapter: nn.Module = make(weight, config, target.name, adapter_name, **cls.layout(target, config))
        return adapter

    @classmethod
    def layout(cls, target: Target, config: LoraConfig) -> dict[str, Any]:
        """What an adapter of this kind must know of a module beside its weight, by attribute."""
        return {}

    @classmethod
    def weight_for(cls, module: nn.Module, adapter_class: type[Adapter]) -> Tensor:
        """The weight that a new adapter of a module sees; without values, if it reads none."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight

    @classmethod
    def start_at_weight(cls, module: nn.Module, adapter: Any) -> dict[str, Tensor]:
        """Start an adapter at a part of a module's weight.

        Returns:
            By name, the parameters for the module to have beside it.
        """
        return {"weight": adapter.init_from_weight(module.weight)}

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        """Why this very module cannot be adapted as the config asks, ``None`` if it can."""
        if (reason := weightless_reason(target.module, target.parameters)) is not None:
            return reason
        if config.needs_matrix and not getattr(cls.adapter_class, "is_matrix", False):
            return f"init_lora_weights={config.init_lora_weights!r} is not for this kind of layer"
        if cls.group != "linear" and has_own_forward(target.module):
            return "the object has a forward of its own, which may compute something else with its weight"
        return None

    def begin(self) -> None:
        """Be a layer of this class that no adapter is in yet."""
        # Not in the module's own state dict.
        self.__dict__.update(_active=(), _merged=False, _aside={}, _seals={}, _rows=None)
        self.lora = nn.ModuleDict()

    def end(self, own_class: type[nn.Module]) -> tuple[type[nn.Module], dict[str, Any]]:
        """Give up what :meth:`begin` brought.

        Args:
            own_class: The class that the layer had before.

        Returns:
            The class for the layer to have from now on, and the attributes that were taken from it.
        """
        taken = {name: self.__dict__.pop(name) for name in _STATE if name in self.__dict__}
        del self.lora
        return own_class, taken

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the class that the layer had before."""
        return super().forward(*args, **kwargs)

    def base_weight(self) -> Tensor:
        """The values of the base's weight that a forward pass computes with."""
        return self.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._own_forward is None:
            out: Tensor = self.base_forward(x, *args, **kwargs)
        else:
            out, is_adapted = self.call_own_forward(x, *args, **kwargs)
            if is_adapted:
                return out
        if self._rows is not None:
            return self._add_by_sample(x, out, self._rows)
        if not self._merged:
            for name in self._active:
                out = self._adapted(name, x, out)
        return out

    def _adapted(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        adapter = self.lora[name]
        added: Tensor = adapter(x, out, Shown(self) if "forward" in vars(adapter) else self)
        return added

    def call_own_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call the object's own forward, or, if it was this that led here, the base class's.

        Returns:
            The output, and whether it has the adapters in it already, since the object's own forward led here.
        """
        if self.is_in_own_forward():
            _calls.led_back[id(self)] = True
            return self.base_forward(*args, **kwargs), False
        _calls.led_back[id(self)] = False
        try:
            return self._own_forward(*args, **kwargs), _calls.led_back[id(self)]
        finally:
            del _calls.led_back[id(self)]

    def is_in_own_forward(self) -> bool:
        """Whether this thread is in a call of the object's own forward."""
        return id(self) in _calls.led_back

    def _add_by_sample(self, x: Tensor, out: Tensor, rows: Rows) -> Tensor:
        """Add to each sample's output the path of its own adapter, all samples of one adapter at once."""
        samples = len(rows.choice)
        present = {name: chosen for name, chosen in rows.samples.items() if name in self.lora}
        adapters: list[Any] = [self.lora[name] for name in present]
        plain = all(adapter.is_plain_lora() and not is_hooked(adapter) for adapter in adapters)
        if adapters and len(x) == samples and plain:
            factors = [(adapter.lora_A, adapter.scaling * adapter.lora_B) for adapter in adapters]
            here = {name: position for position, name in enumerate(present)}
            places = torch.tensor([*(here.get(name, len(here)) for name in rows.samples), len(here)], device=x.device)
            return add_low_rank_by_sample(out, x, factors, places[rows.choice.to(x.device)])
        for name, chosen in present.items():
            index = input_rows(chosen.to(x.device), samples, len(x))
            out = out.index_copy(0, index, self._adapted(name, x[index], out[index]))
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

    def beyond_peft(self) -> list[str]:
        """The adapted parameters that PEFT would leave as they are where they are read."""
        return []

    def misrun_by_peft(self) -> str | None:
        """What PEFT 0.21 does in such a layer by which it computes something else; ``None`` if nothing."""
        return None

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters."""
        return self._active

    @active.setter
    def active(self, names: Iterable[str]) -> None:
        self.__dict__["_active"] = tuple(names)

    @property
    def chosen(self) -> tuple[tuple[str, ...], Rows | None]:
        """Which adapters a forward pass computes with: the active ones, or for a batch those of each sample."""
        return self._active, self._rows

    @chosen.setter
    def chosen(self, choice: tuple[tuple[str, ...], Rows | None]) -> None:
        self.__dict__.update(zip(("_active", "_rows"), choice))

    def modules_at_work(self) -> list[nn.Module]:
        """This layer with what is in it, and the active adapters."""
        active = [self.lora[name] for name in self._active if name in self.lora]
        return [module for _, module in base_modules(self)] + [m for adapter in active for m in adapter.modules()]

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
        modules = self.modules_at_work()
        with unsharded(modules), onloaded(modules):
            for name, parameter in self.adapted_parameters().items():
                if not is_readable(parameter):
                    raise ValueError(
                        f"The {name} of a {type(self).__name__} was quantized after the adapter was put in, so nothing "
                        "can be folded into it: quantize the model first, then inject. Nothing was changed."
                    )
                merged[name] = self._merged_weight(name, parameter)
        return {name: shard_of(self, name, tensor) for name, tensor in merged.items()}

    def merged_as(self, form: MergedForm) -> dict[str, Any]:
        """The same, where quantized ones take on a form: quantized again, they may have parts that are no tensors."""
        return self.merged_weights()

    def _merged_weight(self, name: str, parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        folds = [adapter.row_fold(dtype) for adapter in self.adapters_on(name)]
        by_rows = [fold for fold in folds if fold is not None]
        if len(by_rows) < len(folds) or not is_foldable(parameter):
            merged = self.rounded(self.folded(name, parameter.to(dtype)), parameter.dtype)
            return parameter.detach().clone() if merged is parameter else merged  # as it is if no adapter is active
        merged, finite = folded_by_rows(parameter, by_rows)
        self._require_finite(finite, parameter.dtype)
        return merged

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """A parameter's values, in float32 or better, with all active adapters merged in."""
        for adapter in self.adapters_on(name):
            weight = adapter.fold(weight)
        return weight

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A merged weight in a dtype.

        Raises:
            ValueError: If it holds a NaN or an infinity then.
        """
        weight = weight.to(dtype)
        self._require_finite(is_finite(weight), dtype)
        return weight

    def _require_finite(self, finite: bool, dtype: torch.dtype) -> None:
        if not finite:
            raise ValueError(
                f"Folding the adapter into a {type(self).__name__} of {dtype} gives a NaN or an infinity: the adapter "
                "has diverged, or the weight's dtype is too narrow. Nothing was changed. Take an earlier checkpoint, "
                "or merge in float32."
            )

    def merge(self, merged_weights: Mapping[str, Any]) -> None:
        """Put merged parameters, or values of them, in the place of the base's, which :meth:`unmerge` puts back."""
        self._aside.update(self._exchange(merged_weights))
        self._seals.update(
            (name, Seal(local_tensor(self, name))) for name, each in merged_weights.items() if isinstance(each, Tensor)
        )
        self.__dict__["_merged"] = True

    def merge_like(self, other: "LoraLayer") -> None:
        """Be merged by what was done to another layer, with which this one shares adapters and parameters."""
        self.__dict__.update(_aside=other._aside, _seals=other._seals, _merged=True)

    def unmerge(self) -> None:
        """Put the base's parameters back, bit for bit."""
        self._exchange(self._aside)
        self.forget_base()

    def _exchange(self, others: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put other parameters, or values of them, in the place of what is there, and return that."""
        with self._bringing_weights():
            return {name: self._swap(name, other) for name, other in others.items()}

    def _swap(self, name: str, other: Tensor) -> Tensor:
        """Put a parameter, or values of one, in the place of what is there, and return that."""
        owner_name, _, attribute = name.rpartition(".")
        before = swap_offloaded(self.get_submodule(owner_name), attribute, other)
        return swap_parameters(self, name, other) if before is None else before

    def forget_base(self) -> None:
        """Take the weights as they are now for the base's."""
        self._aside.clear()  # which layers that are merged like this one share
        self._seals.clear()
        self.__dict__.update(_aside={}, _seals={}, _merged=False)

    def is_as_merged(self) -> bool:
        """Whether the weights are still those that :meth:`merge` put there."""
        # What is computed of others by now would be computed anew over whatever is put there.
        return all(self._holds(name) and seal.fits(local_tensor(self, name)) for name, seal in self._seals.items())

    def _holds(self, name: str) -> bool:
        owner_name, _, attribute = name.rpartition(".")
        owner = self.get_submodule(owner_name)
        return attribute in owner._parameters or attribute in owner._buffers

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("lora."):
            raise RuntimeError(
                f"An adapted layer cannot be cut up by parallelize_module, which takes {name!r} for a parameter of its "
                "own: call parallelize_module first, then inject, then fully_shard."
            )
        before = self._parameters.get(name)
        super().register_parameter(name, param)
        if param is not None and before is not None and self._is_at_work_on(name) and _is_another(param, before):
            rank_zero_warn(
                f"The {name} of a {type(self).__name__} was replaced by another one while its adapter is at work, "
                "which goes on as it was trained. If the new one was made of the old one, as fusing a normalization "
                "into the layer does, the adapter does not fit it: merge first."
            )

    def _is_at_work_on(self, name: str) -> bool:
        is_adapted = bool(self.__dict__.get("_active")) and name in self.adapted_parameters()
        return is_adapted and not self._merged and not self.__dict__.get("_brings_weights", False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._bringing_weights():
            super()._load_from_state_dict(*args, **kwargs)

    @contextmanager
    def _bringing_weights(self) -> Iterator[None]:
        """Meanwhile, what takes the place of weights is what is meant to be there."""
        if self.__dict__.get("_brings_weights", False):  # within another
            yield
            return
        self.__dict__["_brings_weights"] = True
        try:
            yield
        finally:
            del self.__dict__["_brings_weights"]


def _is_another(parameter: Tensor, before: Tensor) -> bool:
    """Whether a parameter has other values than one that was there, as far as both can be read."""
    if parameter is before or any(type(each.data) is not Tensor or each.is_meta for each in (parameter, before)):
        return False
    return not torch.equal(parameter, before.to(parameter.device, parameter.dtype))
