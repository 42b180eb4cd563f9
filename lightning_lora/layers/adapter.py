"""What every kind of adapter answers, and LoRA itself: two matrices beside a frozen weight."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.folding import RowFold
from lightning_lora.layers.init import fill_
from lightning_lora.layers.spectrum import singular_values


class Adapter(nn.Module):
    """One adapter of one layer: its trained tensors, and all that others ask of its kind.

    A new kind derives from this class, or from :class:`LoraAdapter`, and is registered by
    :func:`~lightning_lora.layers.register_adapter_kind`. It is made with the arguments of :class:`LoraAdapter`. Its
    ``forward(x, out, layer)`` gets the layer's input and what the base layer, or the adapter before, made of it, and
    returns the layer's output; at the start this is ``out``, bit for bit.
    """

    peft_names: ClassVar[dict[str, str]]  # by the name of each trained tensor here, its name in PEFT's files
    peft_type: ClassVar[str] = "LORA"
    shared_names: ClassVar[tuple[str, ...]] = ()  # of what PEFT stores once for all layers
    # Whether forward is called, so that FSDP may treat the adapter as a unit of its own.
    is_called: ClassVar[bool] = True
    # Whether it sets a weight as a whole, so that no other adapter can be active with it in a layer.
    sets_whole_weight: ClassVar[bool] = False
    # Whether other adapters may be in the same layer at all.
    shares_layer: ClassVar[bool] = True
    # Whether its initialization reads the weight's values, so that these must be there in full.
    reads_weight: ClassVar[bool] = False
    # Whether it can follow nn.Linear under tensor parallelism: lora_A cut as the inputs are, lora_B as the outputs.
    follows_tensor_parallel: ClassVar[bool] = False

    layer_name: str
    # Rows of the weight that it puts others in the place of, so that the base's own do not matter.
    replaced_rows: tuple[int, ...] = ()

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # One that folds in another way than its bases says itself how to do so by rows, or does not.
        if {"fold", "delta_weight"} & vars(cls).keys() and "row_fold" not in vars(cls):
            cls.row_fold = Adapter.row_fold  # type: ignore[method-assign]

    def fold(self, weight: Tensor) -> Tensor:
        """The base weight, in float32 or better, with this adapter merged in."""
        raise NotImplementedError

    def row_fold(self, dtype: torch.dtype) -> RowFold | None:
        """What merges this adapter into rows of the base weight, in place, to the same numbers as :meth:`fold`.

        Args:
            dtype: Of the rows, float32 or better.

        Returns:
            A function of the rows and of the slice that they are, ``None`` if only whole weights can be folded.
        """
        return None

    def size(self) -> str:
        """What the summary says of its size, such as the rank."""
        return ""

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """The A and B of its rank whose product, scaled, is all that it adds; ``None`` if it is not of that form."""
        return None

    def update_spectrum(self) -> Tensor | None:
        """The singular values of all that it adds, as ``(r,)`` on the CPU, the largest first; ``None`` if unknown."""
        return None

    def is_plain_lora(self) -> bool:
        """Whether forward adds ``scaling * B A`` of the input to the output and nothing else."""
        return False

    def peft_tensors(self) -> dict[str, Tensor]:
        """The trained tensors as PEFT names and shapes them."""
        return {peft_name: getattr(self, attribute) for attribute, peft_name in self.peft_names.items()}

    def from_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """By attribute, the trained tensors of what :meth:`peft_tensors` gave, here or in PEFT.

        Raises:
            ValueError: If this adapter cannot hold what they compute.
        """
        return {attribute: tensors[peft_name] for attribute, peft_name in self.peft_names.items()}

    def plain_tensors(self) -> dict[str, Tensor]:
        """The same for the base weight as it was before; a plain LoRA has ``rank_factor`` times the rank then."""
        return self.peft_tensors()

    def mismatch(self, saved: LoraConfig, peft_layer_name: str) -> str | None:
        """Why tensors that were saved under other settings compute something else here; ``None`` if they do not.

        Args:
            saved: The settings of the file.
            peft_layer_name: Name of the layer in the file.
        """
        return None

    @classmethod
    def connect(cls, adapters: Sequence["Adapter"], config: LoraConfig) -> None:
        """Give all new adapters of this class of one injection what they share."""

    @classmethod
    def shared_tensors(cls, adapters: Sequence["Adapter"]) -> dict[str, Tensor]:
        """What PEFT stores once for all layers, by its ``shared_names``."""
        return {}

    @classmethod
    def peft_settings(cls, adapters: Mapping[str, "Adapter"], config: LoraConfig) -> dict[str, Any]:
        """What all adapters of this class, by the names of their layers, add to PEFT's config."""
        return {}

    @classmethod
    def to_peft_config(cls, settings: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
        """PEFT's config of this ``peft_type``, given the entries of a ``LORA``."""
        return settings

    @classmethod
    def from_peft_config(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of :class:`~lightning_lora.LoraConfig` for a config of PEFT's of this ``peft_type``."""
        raise NotImplementedError

    @classmethod
    def describe(cls, config: LoraConfig) -> str:
        """The kind in words, with what two of it must have in common."""
        return "a LoRA" if config.kind == "lora" else f"an adapter of kind {config.kind!r}"


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

    def size(self) -> str:
        return str(self.r)

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        is_plain = self.peft_names.keys() == {"lora_A", "lora_B"}
        fits = is_plain and self.lora_B.shape[1] == self.r and len(self.lora_A) == self.r
        return (self.lora_A, self.lora_B) if fits else None

    def update_spectrum(self) -> Tensor | None:
        factors = self.low_rank_factors()
        return None if factors is None else abs(self.scaling) * singular_values(factors)

    def mismatch(self, saved: LoraConfig, peft_layer_name: str) -> str | None:
        theirs = saved.scaling(peft_layer_name)
        if math.isclose(theirs, self.scaling, rel_tol=1e-6):
            return None
        return (
            f"it scales the update of {self.layer_name} by {theirs:g}, and this model's adapter by {self.scaling:g}: "
            "use the r, lora_alpha and use_rslora with which it was saved"
        )

    @classmethod
    def peft_settings(cls, adapters: Mapping[str, Adapter], config: LoraConfig) -> dict[str, Any]:
        """The rank of each adapter, and the alpha that gives its scaling: the most common, and the others by name."""
        ranks, alphas = {}, {}
        for name, adapter in adapters.items():
            assert isinstance(adapter, LoraAdapter)
            ranks[name] = adapter.r * adapter.rank_factor
            divisor = math.sqrt(ranks[name]) if config.use_rslora else ranks[name]
            alphas[name] = round(adapter.scaling * divisor, 9)
        r, lora_alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
        return {
            "r": r,
            "lora_alpha": lora_alpha,
            "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != r},
            "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != lora_alpha},
        }

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"
