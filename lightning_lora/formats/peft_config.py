"""PEFT's ``adapter_config.json``, out and in."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_lora.config import LoraConfig
from lightning_lora.formats.peft_keys import TABLES, require_readable, start_of
from lightning_lora.layers import Adapter, kind_of_peft_type
from lightning_lora.model.record import Injection
from lightning_lora.model.state_dict import CheckpointError

_NO_LAYERS = "dummy-target-modules"  # PEFT's value of target_modules for a LoRA config that adapts no layer


# Settings that PEFT and this package share name and meaning of.
_SHARED = (
    "r", "lora_alpha", "lora_dropout", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "bias", "use_rslora", "use_dora",
    "trainable_token_indices",
)  # fmt: skip


def peft_config(injection: Injection, prefix: str) -> dict[str, Any]:
    """What ``adapter_config.json`` says of an injection.

    Args:
        injection: The injection.
        prefix: What its names begin with that those in PEFT do not have.
    """
    config = injection.config
    base = injection.root.get_submodule(prefix.rstrip("."))
    targets: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    for name, layer in injection.layers():
        for setting, names in layer.peft_targets(name[len(prefix) :]).items():
            targets[setting] += names
    adapters = [adapter for _, adapter in peft_adapters(injection)]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(base, "config", None), "_name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
        **{name: getattr(config, name) for name in _SHARED},
        # The names themselves, so that globs and regular expressions mean the same to PEFT.
        "target_modules": sorted(targets["target_modules"]) or ([] if config.target_parameters else _NO_LAYERS),
        "target_parameters": sorted(targets["target_parameters"]) or None,
        "trainable_token_indices": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted(name[len(prefix) :] for name in injection.saved) or None,
        "fan_in_fan_out": any(hasattr(layer, "nf") for _, layer in injection.layers()),
        "init_lora_weights": True,
    }
    groups: dict[Any, dict[str, Adapter]] = {}
    for adapter in adapters:
        groups.setdefault(type(adapter).peft_settings.__func__, {})[adapter.layer_name[len(prefix) :]] = adapter  # type: ignore[attr-defined]
    for group in groups.values():
        settings.update(type(next(iter(group.values()))).peft_settings(group, config))
    own_type = next((type(adapter) for adapter in adapters if adapter.peft_type != "LORA"), Adapter)
    return own_type.to_peft_config(settings, config)


def config_from_peft(settings: Mapping[str, Any], source: str) -> LoraConfig:
    """The settings that ``adapter_config.json`` means.

    Args:
        settings: What it holds.
        source: The file, for errors.

    Raises:
        CheckpointError: If it is of a kind, or has a setting, that is not supported.
    """
    peft_type = str(settings.get("peft_type"))
    kind = kind_of_peft_type(peft_type)
    if peft_type not in TABLES and (peft_type == "LORA" or kind is None):
        raise CheckpointError(
            f"{source} describes an adapter of type {peft_type!r}, and only {', '.join(map(repr, TABLES))} and the "
            "types of registered kinds are supported. Nothing was loaded."
        )
    if peft_type in TABLES:
        settings = require_readable(settings, source)
    try:
        if peft_type == "LORA":
            return _lora(settings, source)
        if peft_type == "TRAINABLE_TOKENS":
            return _tokens(settings)
        assert kind is not None
        return LoraConfig(**kind.from_peft_config(settings))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source} cannot be read: {error} Nothing was loaded.") from error


def _lora(settings: Mapping[str, Any], source: str) -> LoraConfig:
    targets = settings["target_modules"]
    return LoraConfig(
        **{name: settings[name] for name in _SHARED},
        target_modules=[] if targets == _NO_LAYERS else targets or [],
        target_parameters=settings["target_parameters"],
        modules_to_save=settings["modules_to_save"],
        init_lora_weights=start_of(settings, source),
    )


def _tokens(settings: Mapping[str, Any]) -> LoraConfig:
    """Rows of embeddings alone, which PEFT has a type of its own for."""
    targets, indices = settings["target_modules"], settings["token_indices"]
    targets = [targets] if isinstance(targets, str) else targets
    return LoraConfig(
        target_modules=[],
        trainable_token_indices=dict.fromkeys(targets, indices) if targets else indices,
        modules_to_save=settings["modules_to_save"],
    )


def peft_adapters(injection: Injection) -> Iterator[tuple[str, Adapter]]:
    """The adapters of one injection, each under the name that its layer has in PEFT, the first if it has several."""
    seen = set()
    for name, layer in injection.layers():
        for suffix, adapter in layer.peft_adapters(injection.adapter_name).items():
            if adapter not in seen:
                seen.add(adapter)
                yield f"{name}{suffix}", adapter
