"""What to adapt and how: the validated settings of one LoRA adapter."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lightning_lora.patterns import fullmatch, require_expression
from lightning_lora.plain import plain

ALL_LINEAR = "all-linear"
LAYER_GROUPS = ("linear", "conv", "recurrent")  # words for "all-linear" and what is added to it
AUTO = "auto"
LOFTQ = re.compile(r"loftq(?:_(4|8)(?:_niter_([1-9]\d*))?)?")
# Settings that choose layers: they may be spelled in many ways, and what comes of them is in the names of tensors.
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_BIAS_MODES = ("none", "all", "lora_only")
_INITS = (True, False, "gaussian", "orthogonal", "olora", "pissa", "loftq", "eva")
_NUMBERED_INITS = (re.compile(r"pissa_niter_\d+"), LOFTQ)
_NOT_BESIDE_VERA = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "freeze_A", "rank_dropout", "fused_qkv",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Settings of one LoRA adapter, under the names that PEFT users know.

    The adapted layer computes ``W0 x + scaling * B A x`` with ``scaling = lora_alpha / r`` (Hu et al., "LoRA: Low-Rank
    Adaptation of Large Language Models", arXiv 2106.09685), or ``lora_alpha / sqrt(r)`` with ``use_rslora``
    (Kalajdzievski, arXiv 2312.03732).

    Args:
        r: Rank of the update, at least 1.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Probability of dropping an input element of the adapter path while training, in ``[0, 1)``.
        target_modules: Which layers to adapt. A list holds module names, each matched exactly, as a dotted suffix
            (``"q_proj"``) or as a glob (``"*.layers.[01].*_proj"``); a string is one regular expression that must match
            the whole name; ``"all-linear"`` is every supported linear layer but the output head, and
            ``"all-linear+conv"`` and ``"all-linear+recurrent"`` (or both, ``"all-linear+conv+recurrent"``) are every
            convolution, or LSTM, GRU and RNN, too. A name of a module that holds layers means the layers inside of it.
        fused_qkv: Of targets that compute query, key and value in one (``c_attn``, ``query_key_value``, ``qkv_proj``,
            ...), the parts to adapt, such as ``["q", "v"]``, each with an A and B of its own; ``None`` adapts such a
            layer as a whole, like any other.
        exclude_modules: Layers to leave out of ``target_modules``, written in the same ways.
        target_parameters: Parameters to adapt that a module reads itself, as mixtures of experts stack those of all
            experts in one tensor of shape ``(experts, out, in)``: a list of names, matched as in ``target_modules``
            (``["experts.gate_up_proj", "experts.down_proj"]``). ``target_modules`` may be empty then.
        trainable_token_indices: Rows of an embedding to train in full beside the adapters, such as those of new tokens:
            a list of indices into the input embedding, or such lists by the name of the embedding, matched as in
            ``target_modules``. Modules that are tied to it, as an output head may be, get the same rows and stay tied.
            ``target_modules`` may be empty then.
        rank_pattern: Ranks that differ from ``r``, by module name or regular expression matched at the name's end.
        alpha_pattern: The same for ``lora_alpha``.
        layers_to_transform: Indices of the blocks to adapt (``model.layers.<index>.``); ``None`` is all of them.
        layers_pattern: Name of the list that holds the blocks, where a model has several, or several such names;
            ``None`` is any list.
        modules_to_save: Modules trained in full and stored with the adapter, and single parameters and buffers by their
            names, such as positional encodings and class tokens. ``"auto"`` finds new heads: in a transformers model
            everything beside the pretrained body and its output embedding, and in a module that contains a transformers
            model everything outside of that, unless it is a frozen reference beside a larger model.
        bias: ``"none"`` trains no bias, ``"all"`` every bias, ``"lora_only"`` those of adapted layers.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        use_dora: Train a magnitude for each output beside the direction (DoRA; Liu et al., arXiv 2402.09353).
        init_lora_weights: ``True`` draws A from the Kaiming-uniform distribution of ``nn.Linear``, ``"gaussian"`` from
            a normal one with deviation ``1 / r``; B (in an embedding A) is zero, so that the fresh adapter changes
            nothing. ``"pissa"`` (Meng et al., arXiv 2404.02948) starts at the principal singular vectors of the weight,
            ``"pissa_niter_<n>"`` at a fast approximation of them, ``"olora"`` (Büyükakyüz, arXiv 2406.01775) at its QR
            decomposition; both take their start out of the weight, so that the function changes by rounding alone.
            ``"loftq"`` (Li et al., arXiv 2310.08659) quantizes the base to 4-bit NormalFloat and starts at the
            principal part of the error, ``"loftq_8"`` at that of rows of 8-bit integers, and ``"loftq_4_niter_5"``
            does both in turn five times. Unlike in PEFT, the scaling is divided out of the start. ``"eva"`` (Paischer
            et al., arXiv 2410.07170) starts A at the principal directions of the layer's inputs, which the ``LoRA``
            callback finds with training batches when ``fit`` starts, and
            :func:`~lightning_lora.initialize_eva` without a Trainer; until then, A is as under ``True``.
            ``"orthogonal"`` draws A and B from orthogonal subspaces (even ranks), and ``False`` draws B too.
        freeze_A: Train B alone and leave A at its random start (LoRA-FA; Zhang et al., arXiv 2308.03303): half the
            optimizer state, and a linear layer need not keep its input for the backward pass. In an embedding, where
            A is what starts at zero, B is frozen instead.
        use_vera: Share one frozen random A and B among all layers, and train two vectors for each (VeRA; Kopiczko et
            al., arXiv 2310.11454). Use a far higher ``r``, such as 256; ``lora_alpha`` has no effect.
        vera_d_initial: What the vector over the ranks starts at, with ``use_vera``.
        rank_dropout: Probability, in ``[0, 1)``, of dropping a whole rank component of an adapter in a forward pass
            while training; the others are scaled by ``1 / (1 - rank_dropout)``.
        seed: Seed of the initial weights. Each tensor depends on this seed and on its own name only, so all ranks and
            any order of injection agree.
        adapter_kind: Name of the kind of adapter: ``"lora"``, or one that was registered with
            :func:`~lightning_lora.layers.register_adapter_kind`. ``use_dora`` and ``use_vera`` choose theirs.

    Raises:
        ValueError: If a value is out of range or of no known kind.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    fused_qkv: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: str | list[str] | None = AUTO
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    freeze_A: bool = False
    use_vera: bool = False
    vera_d_initial: float = 0.1
    rank_dropout: float = 0.0
    seed: int = 0
    adapter_kind: str = "lora"

    def __post_init__(self) -> None:
        self._make_plain()
        self._check_numbers()
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            self._check_patterns(name)
        self._check_tokens()
        self._check_targets()
        self._check_words()
        self._check_together()

    def _make_plain(self) -> None:
        """Take what NumPy, Hydra and others have in place of plain types, and ``None`` for a dict that is empty."""
        for field in dataclasses.fields(LoraConfig):
            value = getattr(self, field.name)
            if field.default_factory is dict:
                if not isinstance(value, (Mapping, type(None))):
                    raise ValueError(
                        f"{field.name} is {value!r}, but it must be a dict by names or patterns of modules, or None."
                    )
                value = value or {}
            object.__setattr__(self, field.name, plain(value))

    def _check_numbers(self) -> None:
        _require_rank("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            _require_rank(f"rank_pattern[{pattern!r}]", rank)
        for name, alpha in [("lora_alpha", self.lora_alpha)] + [
            (f"alpha_pattern[{pattern!r}]", alpha) for pattern, alpha in self.alpha_pattern.items()
        ]:
            if not _is_number(alpha) or alpha <= 0:
                raise ValueError(f"{name} is {alpha!r}, but it must be a positive number: pass, say, twice the rank.")
        for name in ("lora_dropout", "rank_dropout"):
            probability = getattr(self, name)
            if not _is_number(probability) or not 0.0 <= probability < 1.0:
                raise ValueError(f"{name} is {probability!r}, but it must lie in [0, 1): pass 0.0 for none.")
        if not _is_number(self.vera_d_initial) or self.vera_d_initial == 0:
            raise ValueError(
                f"vera_d_initial is {self.vera_d_initial!r}, but it must be a number other than zero, at which nothing "
                "would get a gradient: pass 0.1, as in the paper."
            )

    def _check_patterns(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str) and value.startswith(ALL_LINEAR):
            unknown = [word for word in value.removeprefix(ALL_LINEAR).split("+")[1:] if word not in LAYER_GROUPS]
            if unknown or name != "target_modules" or value.split("+")[0] != ALL_LINEAR:
                added = " and ".join(repr(f"+{group}") for group in LAYER_GROUPS[1:])
                raise ValueError(
                    f"{name} is {value!r}, but {ALL_LINEAR!r} is for target_modules, and what can be added to it is "
                    f"{added}."
                )
        elif isinstance(value, str) and value != AUTO:
            if name == "modules_to_save":
                raise ValueError(f"modules_to_save is {value!r}, but it must be a list of names, 'auto' or None.")
            require_expression(value, name)
        elif not isinstance(value, (str, list, type(None))):
            raise ValueError(f"{name} is of type {type(value).__name__}, but it must be a list of names or a string.")

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
        for indices in lists:
            valid = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
            if not valid or not indices or len(set(indices)) < len(indices):
                raise ValueError(
                    f"trainable_token_indices is {tokens!r}, but it must be a list of token indices, each an integer "
                    "of at least 0 and there once, or a dict of such lists by the name of the embedding: correct it, "
                    "or pass None for none."
                )

    def _check_targets(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                require_expression(pattern, name)
        if not isinstance(self.target_parameters, (list, type(None))):
            raise ValueError(
                f"target_parameters is {self.target_parameters!r}, but it must be a list of names or None."
            )
        if not self.target_modules and not self.target_parameters and not self.trainable_token_indices:
            raise ValueError(
                'target_modules is empty, so there is nothing to adapt: name layers such as ["q_proj", "v_proj"], or '
                'pass "all-linear".'
            )

    def _check_words(self) -> None:
        if isinstance(self.fused_qkv, list):
            object.__setattr__(self, "fused_qkv", sorted(self.fused_qkv, key="qkv".find))
        if self.fused_qkv is not None and (not self.fused_qkv or set(self.fused_qkv) - {"q", "k", "v"}):
            raise ValueError(f'fused_qkv is {self.fused_qkv!r}, but it must be a list of "q", "k" and "v", or None.')
        if self.bias not in _BIAS_MODES:
            raise ValueError(f"bias is {self.bias!r}, but it must be one of {', '.join(map(repr, _BIAS_MODES))}.")
        if self.init_lora_weights not in _INITS and not any(
            pattern.fullmatch(str(self.init_lora_weights)) for pattern in _NUMBERED_INITS
        ):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}, but it must be one of "
                f"{', '.join(map(repr, _INITS))}, 'pissa_niter_<number of iterations>', 'loftq_<4 or 8 bits>' or "
                "'loftq_<4 or 8 bits>_niter_<number of iterations>'."
            )

    def _check_together(self) -> None:
        """Refuse settings of which each is right, and not beside the other."""
        start = f"init_lora_weights={self.init_lora_weights!r}"
        if self.fused_qkv and (self.use_dora or self.takes_from_base or self.init_lora_weights == "orthogonal"):
            raise ValueError(
                "fused_qkv gives each part of a layer an A and B of its own, while DoRA and the orthogonal, PiSSA and "
                "OLoRA starts are for whole matrices: leave one of them out."
            )
        if self.adapter_kind not in ("lora", self.kind):
            raise ValueError(
                f"{self.kind_setting} and adapter_kind={self.adapter_kind!r} do not go together: leave one of them out."
            )
        if self.use_dora and self.takes_from_base:
            raise ValueError(
                f"use_dora and {start} do not go together: DoRA's magnitude is that of the whole weight, out of which "
                "this start is taken. Use one of them."
            )
        clashing = [name for name in _NOT_BESIDE_VERA if getattr(self, name)]
        if self.init_lora_weights is not True:
            clashing.append("init_lora_weights")
        if self.use_vera and clashing:
            raise ValueError(
                f"use_vera and {clashing[0]} do not go together: VeRA's A and B are random, frozen and shared by all "
                "layers. Use one of them."
            )
        if self.freeze_A and (self.takes_from_base or self.init_lora_weights in (False, "orthogonal")):
            raise ValueError(
                f"freeze_A and {start} do not go together: with A frozen, B must start at zero and learn the whole "
                "update. Use one of them."
            )
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights is 'orthogonal', which needs even ranks, but there is {odd[0]}.")

    @property
    def layer_groups(self) -> frozenset[str]:
        """The groups of layers that ``"all-linear"`` and what is added to it mean; none where layers are named."""
        is_word = isinstance(self.target_modules, str) and self.target_modules.startswith(ALL_LINEAR)
        return frozenset(self.target_modules.removeprefix("all-").split("+")) if is_word else frozenset()  # type: ignore[union-attr]

    @property
    def kind(self) -> str:
        """Name of the kind of adapter."""
        return "dora" if self.use_dora else "vera" if self.use_vera else self.adapter_kind

    @property
    def kind_setting(self) -> str:
        """The setting that chooses the kind of adapter."""
        return "use_dora" if self.use_dora else "use_vera" if self.use_vera else f"adapter_kind={self.adapter_kind!r}"

    @property
    def takes_from_base(self) -> bool:
        """Whether the adapter starts at a part of the base weight, which is then another one."""
        return self.quantizes_base or str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def needs_matrix(self) -> bool:
        """Whether the start is one for the two factors of a matrix alone."""
        return self.takes_from_base or self.init_lora_weights in ("orthogonal", "eva")

    @property
    def quantizes_base(self) -> bool:
        """Whether the base weight is quantized, and the adapter starts at a part of what that took from it."""
        return self.quantization is not None

    @property
    def quantization(self) -> tuple[int, int] | None:
        """The bits to which LoftQ quantizes the base, and its iterations; ``None`` without LoftQ."""
        return quantization(str(self.init_lora_weights))

    def rank(self, module_name: str) -> int:
        """The rank of the adapter of the module with this name."""
        return int(_first_match(self.rank_pattern, module_name, self.r, "rank_pattern"))

    def alpha(self, module_name: str) -> float:
        """The ``lora_alpha`` of the module with this name."""
        return float(_first_match(self.alpha_pattern, module_name, self.lora_alpha, "alpha_pattern"))

    def scaling(self, module_name: str) -> float:
        """The factor in front of ``B A`` for the module with this name."""
        rank = self.rank(module_name)
        if self.use_vera:
            return 1.0
        return self.alpha(module_name) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, which ``from_dict`` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoraConfig":
        """Make a config of plain values.

        Raises:
            ValueError: If a name is unknown, as when a newer version wrote the values.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(
                f"The LoRA settings hold {', '.join(unknown)}, which this version of lightning-lora does not know: a "
                "newer version probably wrote them, so update lightning-lora."
            )
        return cls(**values)


def quantization(start: str) -> tuple[int, int] | None:
    """The bits and the iterations that the name of a LoftQ start asks for; ``None`` if it is another start."""
    match = LOFTQ.fullmatch(start)
    return None if match is None else (int(match[1] or 4), int(match[2] or 1))


def _require_rank(name: str, rank: Any) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name} is {rank!r}, but a rank must be an integer of at least 1: 8 is a common choice.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _first_match(patterns: dict[str, Any], module_name: str, default: Any, setting: str) -> Any:
    for pattern, value in patterns.items():
        if fullmatch(rf"(.*\.)?({pattern})$", module_name, setting):
            return value
    return default
