"""PEFT's ``adapter_config.json``, out and in."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_lora.config import LoraConfig
from lightning_lora.layers import Adapter, LoraAdapter, LoraParameters, TokenAdapter
from lightning_lora.model.record import Injection
from lightning_lora.model.state_dict import (
    CheckpointError,
)

_NO_LAYERS = "dummy-target-modules"  # PEFT's value of target_modules for a LoRA config that adapts no layer


# Settings that PEFT and this package share name and meaning of.
_SHARED = (
    "r", "lora_alpha", "lora_dropout", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "bias", "use_rslora", "use_dora",
    "trainable_token_indices",
)  # fmt: skip


def _ranks(injection: Injection) -> dict[str, Any]:
    """The rank of each adapter in the export, and the alpha that gives its scaling: the most common, and the others."""
    ranks, alphas = {}, {}
    for _, adapter in peft_adapters(injection):
        if not isinstance(adapter, LoraAdapter):
            continue
        rank = ranks[adapter.layer_name] = adapter.r * adapter.rank_factor
        divisor = math.sqrt(rank) if injection.config.use_rslora else rank
        alphas[adapter.layer_name] = round(adapter.scaling * divisor, 9)
    if not ranks:
        return {}
    r, lora_alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != lora_alpha},
    }


def peft_config(injection: Injection, prefix: str) -> dict[str, Any]:
    config = injection.config
    base = injection.root.get_submodule(prefix.rstrip("."))
    layers = list(injection.layers())
    tokens = {name: a.tokens for name, a in peft_adapters(injection) if isinstance(a, TokenAdapter)}
    names = sorted(name[len(prefix) :] for name, layer in layers if layer.is_module_target)
    base_name = getattr(getattr(base, "config", None), "_name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "task_type": None,
        "inference_mode": True,
        **{name: getattr(config, name) for name in _SHARED},
        **_ranks(injection),
        # The names themselves, so that globs and regular expressions mean the same to PEFT.
        "target_modules": names or ([] if config.target_parameters else _NO_LAYERS),
        "target_parameters": sorted(
            f"{name}.{parameter}"[len(prefix) :]
            for name, layer in layers
            if isinstance(layer, LoraParameters) and not layer.is_module_target
            for parameter in layer.adapted_parameters()
        )
        or None,
        "trainable_token_indices": {name[len(prefix) :]: list(found) for name, found in tokens.items()} or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted(name[len(prefix) :] for name in injection.saved) or None,
        "fan_in_fan_out": any(hasattr(layer, "nf") for _, layer in layers),
        "init_lora_weights": True,
    }


def vera_config(injection: Injection, prefix: str) -> dict[str, Any]:
    """The same for VeRA, which PEFT has a type of its own for."""
    config, plain = injection.config, peft_config(injection, prefix)
    kept = ("base_model_name_or_path", "task_type", "inference_mode", "target_modules", "modules_to_save")
    return {
        "peft_type": "VERA",
        **{name: plain[name] for name in (*kept, "fan_in_fan_out")},
        "r": config.r,
        "d_initial": config.vera_d_initial,
        "projection_prng_key": config.seed,
        "save_projection": True,
        "vera_dropout": config.lora_dropout,
        "bias": config.bias.replace("lora_only", "vera_only"),
        "init_weights": True,
    }


def config_from_peft(settings: dict[str, Any], directory: Path) -> LoraConfig:
    if settings.get("peft_type") == "VERA":
        return LoraConfig(
            r=settings["r"],
            lora_dropout=settings.get("vera_dropout", 0.0),
            target_modules=settings["target_modules"],
            layers_to_transform=settings.get("layers_to_transform"),
            layers_pattern=settings.get("layers_pattern"),
            modules_to_save=settings.get("modules_to_save"),
            bias=settings.get("bias", "none").replace("vera_only", "lora_only"),
            seed=settings.get("projection_prng_key", 0),
            use_vera=True,
            vera_d_initial=settings.get("d_initial", 0.1),
        )
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{directory / CONFIG_FILE} describes an adapter of type {settings.get('peft_type')!r}, and only 'LORA' "
            "and 'VERA' are supported. Nothing was loaded."
        )
    unsupported = [name for name in ("lora_bias", "use_qalora") if settings.get(name)]
    if unsupported:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} uses {', '.join(unsupported)}, which this version does not support. Nothing "
            "was loaded."
        )
    start = str(settings.get("init_lora_weights"))
    if start in ("corda", "lora_ga"):
        raise CheckpointError(
            f"{directory / CONFIG_FILE} says that the adapter started at a part of the base weight by {start!r}, which "
            "cannot be computed here. Convert it to a plain LoRA with PEFT first. Nothing was loaded."
        )
    shared = {name: settings[name] for name in _SHARED if name in settings}
    return LoraConfig(
        **shared,
        target_modules=[] if settings["target_modules"] == _NO_LAYERS else settings["target_modules"] or [],
        target_parameters=settings.get("target_parameters"),
        modules_to_save=settings.get("modules_to_save"),
        init_lora_weights=start if start.startswith(("pissa", "olora")) else True,
    )


CONFIG_FILE = "adapter_config.json"


def peft_adapters(injection: Injection) -> Iterator[tuple[str, Adapter]]:
    """The adapters of one injection, each under the name that its layer has in PEFT, the first if it has several."""
    seen = set()
    for name, layer in injection.layers():
        for suffix, adapter in layer.peft_adapters(injection.adapter_name).items():
            if adapter not in seen:
                seen.add(adapter)
                yield f"{name}{suffix}", adapter
