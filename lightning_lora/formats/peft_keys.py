"""What each key of PEFT's ``adapter_config.json`` means here: the one table by which files are read.

A key is held (its meaning has a place in :class:`~lightning_lora.LoraConfig`), without effect on what saved tensors
compute, or refused by name wherever it is set to something else than PEFT's default. Keys that are not in the table,
as a newer PEFT may write them, are refused too, unless they are empty. Types and defaults are those of PEFT 0.21.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_lora.formats.schema import require_type
from lightning_lora.model.state_dict import CheckpointError


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        type: What its value must be.
        default: PEFT's, for files that leave it out.
        role: What becomes of it here.
        variant: What a refused one stands for, in words.
    """

    type: Any
    default: Any
    role: Literal["held", "no effect", "refused"]
    variant: str = ""


def _held(type: Any, default: Any) -> Key:
    return Key(type, default, "held")


def _no_effect(type: Any, default: Any) -> Key:
    return Key(type, default, "no effect")


def _refused(default: Any, variant: str) -> Key:
    return Key(Any, default, "refused", variant)


_NAMES = str | list[str] | None
_COMMON = {
    "peft_type": _held(str, None),
    "peft_version": _held(str | None, None),  # by which the layout of experts is told
    "base_model_name_or_path": _no_effect(str | None, None),
    "revision": _no_effect(str | None, None),
    "task_type": _no_effect(str | None, None),
    "auto_mapping": _no_effect(dict[str, Any] | None, None),
    "inference_mode": _no_effect(bool, False),
    "fan_in_fan_out": _no_effect(bool, False),  # the layer itself tells its layout
    "target_modules": _held(_NAMES, None),
    "modules_to_save": _held(list[str] | None, None),
    "layers_to_transform": _held(int | list[int] | None, None),
    "layers_pattern": _held(_NAMES, None),
}
LORA = _COMMON | {
    "r": _held(int, 8),
    "lora_alpha": _held(float, 8),
    "lora_dropout": _held(float, 0.0),
    "use_rslora": _held(bool, False),
    "use_dora": _held(bool, False),
    "rank_pattern": _held(dict[str, int] | None, {}),
    "alpha_pattern": _held(dict[str, float] | None, {}),
    "exclude_modules": _held(_NAMES, None),
    "target_parameters": _held(list[str] | None, None),
    "trainable_token_indices": _held(list[int] | dict[str, list[int]] | None, None),
    "bias": _held(str, "none"),
    "lora_bias": _held(bool, False),
    "ensure_weight_tying": _held(bool, False),
    "use_bdlora": _held(dict[str, Any] | None, None),  # a LoRA with blocks of zeros
    "velora_config": _held(dict[str, Any] | None, None),  # a LoRA with a backward pass of its own
    "init_lora_weights": _held(bool | str | None, True),
    "loftq_config": _held(dict[str, Any] | None, {}),
    "corda_config": _no_effect(Any, None),
    "eva_config": _no_effect(Any, None),
    "lora_ga_config": _no_effect(Any, None),
    "megatron_core": _no_effect(Any, "megatron.core"),
    "qalora_group_size": _no_effect(Any, 16),
    "runtime_config": _no_effect(Any, None),
    "alora_invocation_tokens": _refused(None, "Activated LoRA, which works from its invocation tokens on alone"),
    "arrow_config": _refused(None, "Arrow, which routes among several adapters"),
    "kasa_config": _refused(None, "KaSA, which changes the base weight and has singular values of its own"),
    "layer_replication": _refused(None, "a base whose layers are repeated"),
    "megatron_config": _refused(None, "layers of Megatron"),
    "monteclora_config": _refused(None, "MonteCLoRA, which samples its weights"),
    "use_qalora": _refused(False, "QA-LoRA, which pools the inputs of quantized layers"),
}
VERA = _COMMON | {
    "r": _held(int, 256),
    "projection_prng_key": _held(int, 0),
    "save_projection": _no_effect(bool, True),
    "vera_dropout": _held(float, 0.0),
    "d_initial": _held(float, 0.1),
    "bias": _held(str, "none"),
    "init_weights": _no_effect(bool, True),
}
TRAINABLE_TOKENS = _COMMON | {
    "token_indices": _held(list[int], []),
    "init_weights": _no_effect(bool, True),
}
TABLES: Mapping[str, Mapping[str, Key]] = {"LORA": LORA, "VERA": VERA, "TRAINABLE_TOKENS": TRAINABLE_TOKENS}

# Starts that take a part out of the base weight which cannot be computed again, and why.
_LOST_STARTS = {
    "corda": "a part of the base weight that was chosen by its data",
    "lora_ga": "a part of the base weight that was chosen by gradients on its data",
    "pissa_niter": "a part of the base weight that a random decomposition gave, which is not in the file",
}
# Starts of which the saved tensors tell all: the base weight stays as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_IN_ANY_CASE = ("gaussian", "mica", "olora")  # as PEFT takes them, and no others


def require_readable(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Require settings of which each can be held, or has no effect on what saved tensors compute.

    Args:
        settings: What ``adapter_config.json`` holds, of one of the types in ``TABLES``.
        source: The file, for errors.

    Returns:
        The settings, with PEFT's defaults for what is left out.

    Raises:
        CheckpointError: Naming the key, and what it stands for.
    """
    table = TABLES[settings["peft_type"]]
    for name, value in settings.items():
        key = table.get(name)
        if key is None and value not in (None, False, "", [], {}):
            version = settings.get("peft_version")
            raise CheckpointError(
                f"{source} sets {name}={_short(value)}, which is not known here"
                + (f" (PEFT {_short(version)} wrote it)" if version else "")
                + ": it may change what the adapter computes. If it does not, take it out of the file. Nothing was "
                "loaded."
            )
        if key is not None and key.role == "refused" and value not in (key.default, None):
            raise CheckpointError(
                f"{source} sets {name}={_short(value)}: {key.variant}. This is not supported, and would compute "
                "something else as a plain LoRA. Nothing was loaded."
            )
        if key is not None:
            require_type(value, key.type, source, name)
    return {**{name: key.default for name, key in table.items()}, **settings}


def start_of(settings: Mapping[str, Any], source: str) -> bool | str:
    """The start (``init_lora_weights``) that the base weight under a LoRA needs.

    Raises:
        CheckpointError: If what was taken out of the base weight cannot be computed again.
    """
    start, loftq = settings["init_lora_weights"], settings["loftq_config"] or {}
    start = next((word for word in _IN_ANY_CASE if str(start).lower() == word), start)
    if start in _PLAIN_STARTS:
        return True
    if start in ("olora", "pissa"):
        return str(start)
    if start == "loftq":
        bits, iterations = loftq.get("loftq_bits", 4), loftq.get("loftq_iter", 1)
        # PEFT rounds to 4 bits as QLoRA does, and to others in a way of its own.
        if bits == 4 and type(iterations) is int and 1 <= iterations <= LOFTQ_ITERATIONS:
            return f"loftq_4_niter_{iterations}"
        reason = f"a base that LoftQ has quantized ({_short(loftq)}), of which only that to 4 bits is supported"
    else:
        kind = next((kind for kind in _LOST_STARTS if str(start).startswith(kind)), None)
        reason = _LOST_STARTS[kind] if kind else "a base under a start that is not known here"
    raise CheckpointError(
        f"{source} sets init_lora_weights={_short(start)}: the adapter belongs on {reason}. Convert it to a plain LoRA "
        "with PEFT first (save_pretrained with path_initial_model_for_weight_conversion). Nothing was loaded."
    )


LOFTQ_ITERATIONS = 100  # of a file at most: each is a singular value decomposition of every weight


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
