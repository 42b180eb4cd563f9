"""What every adapted layer shares: the adapter module, and the class that a base layer takes on while adapted."""

from functools import cache
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.initialize import fill_


class LoraAdapter(nn.Module):
    """The trained matrices of one adapter on one layer, a module of its own.

    It is a module, and its forward computes the whole low-rank path, so that strategies which shard or gather by
    module can treat the few trained parameters apart from the frozen weight beside them.

    Args:
        base_layer: The layer to adapt, whose device the adapter shares. Half-precision bases get float32 adapters,
            since small updates would be lost in half precision; a ``"bf16-true"`` Trainer still casts them.
        config: Rank, scaling, dropout and initial values.
        layer_name: Qualified name of the layer, for patterns and for the seed.
        adapter_name: Name of the adapter, for the seed.
    """

    peft_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    # Whether A and B are factors of one matrix, which is what the orthogonal start and those from the weight need.
    is_matrix: ClassVar[bool] = False
    out_dim: ClassVar[int] = 0  # the dimension of the base weight that counts outputs

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base_layer: nn.Module, config: LoraConfig, layer_name: str, adapter_name: str) -> None:
        super().__init__()
        self.r = config.rank(layer_name)
        self.scaling = config.scaling(layer_name)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.training = base_layer.training
        self._init = config.init_lora_weights
        self._seed = config.seed
        self._qualified_name = f"{layer_name}.{adapter_name}"
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape_A, shape_B = self.shapes(base_layer)
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(shape_B, dtype=dtype, device=weight.device))
        self.reset_parameters()

    def shapes(self, base_layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for this layer."""
        raise NotImplementedError

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        """Add the low-rank path of the layer's input ``x`` to the base layer's output ``out``."""
        return self.add_path(self.dropout(x), out, layer, self.lora_B)

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
        """The base weight, in float32 or better, with this adapter in it."""
        return weight + self.delta_weight()

    def reset_parameters(self) -> None:
        """Draw the initial values, the same ones each time."""
        kind = "gaussian" if self._init == "gaussian" else "kaiming"
        fill_(self.lora_A, kind, self._seed, f"{self._qualified_name}.lora_A")
        fill_(self.lora_B, "kaiming" if self._init is False else "zeros", self._seed, f"{self._qualified_name}.lora_B")

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class LoraLayer(nn.Module):
    """A base layer with adapters: the class that the layer takes on while it is adapted.

    Adapting changes the layer's class in place, so the layer keeps its identity: its parameters and their names, its
    hooks, and every reference that other modules hold to it. Taking the adapters out gives the class back.
    """

    adapter_class: ClassVar[type[LoraAdapter]]
    dora_class: ClassVar[type[LoraAdapter]]
    is_linear: ClassVar[bool] = True  # one that "all-linear" means

    lora: nn.ModuleDict
    weight: nn.Parameter
    _base_weight: Optional[nn.Parameter]

    @classmethod
    def adapter_class_for(cls, config: LoraConfig) -> type[LoraAdapter]:
        """The class of adapter that a config asks for."""
        return cls.dora_class if config.use_dora else cls.adapter_class

    @classmethod
    def objection(cls, module: nn.Module, config: LoraConfig) -> Optional[str]:
        """Why this very module cannot be adapted as the config asks, ``None`` if it can."""
        if "weight" not in module._parameters:
            return "its weight is computed of others (a parametrization), so nothing can be folded into it"
        if not cls.adapter_class.is_matrix and (config.takes_from_base or config.init_lora_weights == "orthogonal"):
            return f"init_lora_weights={config.init_lora_weights!r} is not for this kind of layer"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self._base_weight is None:
            for adapter in self.lora.values():
                out = adapter(x, out, self)
        return out

    @property
    def merged(self) -> bool:
        """Whether the adapters are folded into the weight."""
        return self._base_weight is not None

    def merged_weight(self) -> nn.Parameter:
        """The weight with all adapters folded in, rounded once to the weight's dtype.

        Raises:
            ValueError: If it holds a NaN or an infinity.
        """
        with torch.no_grad():
            total = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
            for adapter in self.lora.values():
                total = adapter.fold(total)  # type: ignore[operator]
            merged = total.to(self.weight.dtype)
            if not torch.isfinite(merged).all():
                raise ValueError(
                    f"Folding the adapter into a {type(self).__name__} of {merged.dtype} gives a NaN or an infinity: "
                    "the adapter has diverged, or the weight's dtype is too narrow. Nothing was changed. Take an "
                    "earlier checkpoint, or merge in float32."
                )
        return nn.Parameter(merged, requires_grad=False)

    def merge(self, merged_weight: nn.Parameter) -> None:
        """Put a merged weight in the base weight's place, which is kept as it is for :meth:`unmerge`."""
        # A new parameter, not a change of the old one: a layer tied to this one keeps the base weight.
        self.__dict__["_base_weight"] = self.weight  # out of the module's own parameters and state dict
        self.weight = merged_weight

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        assert self._base_weight is not None
        # The base weight was out of sight if the model moved to another device meanwhile.
        self._base_weight.data = self._base_weight.data.to(self.weight.device)
        self.weight = self._base_weight
        self.__dict__["_base_weight"] = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy must find it by the base class.
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return (_new_adapted, (type(self).__mro__[1], base_class(self)), *state)


@cache
def adapted_class(layer_class: type[LoraLayer], base: type[nn.Module]) -> type[LoraLayer]:
    """The class of a ``base`` module that is adapted as a ``layer_class``."""
    return type(f"Lora{base.__name__}", (layer_class, base), {"__module__": layer_class.__module__})


def base_class(layer: LoraLayer) -> type[nn.Module]:
    """The class that an adapted layer had before."""
    return type(layer).__bases__[1]


def _new_adapted(layer_class: type[LoraLayer], base: type[nn.Module]) -> LoraLayer:
    cls = adapted_class(layer_class, base)  # type: ignore[arg-type]
    return cls.__new__(cls)
