"""What a checkpoint says of its adapters: settings, names and the base that they belong to, in plain types."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, get_type_hints

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import TypedDict

from lightning_lora.config import CHOOSING, LoraConfig
from lightning_lora.formats.schema import require_type
from lightning_lora.fqn import listed
from lightning_lora.model.fingerprint import Fingerprint, fingerprint
from lightning_lora.model.multi_adapter import active_adapters, adapters, set_adapter
from lightning_lora.model.quantization import described
from lightning_lora.model.record import Injection, named_injections
from lightning_lora.model.state_dict import CheckpointError

FORMAT_VERSION = 1
_QUANTIZED_APART = 0.35  # at most, of one base in two formats; two bases are more than 1 apart


class Entry(TypedDict):
    """What is said of one adapter; see :class:`~lightning_lora.model.record.Injection`."""

    module: str
    adapter_name: str
    config: dict[str, Any]
    base_fingerprint: str
    base_samples: NotRequired[str | None]
    base_sketches: NotRequired[str | None]
    base_config: NotRequired[dict[str, Any] | None]
    beneath: NotRequired[list[dict[str, Any]]]
    runs: NotRequired[list[str]]
    active: NotRequired[bool]  # if it was not
    peft: NotRequired[dict[str, dict[str, Any]]]


class Metadata(TypedDict):
    """What is said of all."""

    format_version: NotRequired[int]
    merged: NotRequired[bool]  # whether they are merged into weights that are there in full
    adapters: list[Entry]


_BINDING = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fused_qkv",
    "trainable_token_indices", "use_vera", "adapter_kind",
)  # fmt: skip

# Settings of PEFT that say where an adapter is from, how it was begun, or which layers it is for.
_FREE_IN_PEFT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "init_weights", "peft_version",
    "revision", "runtime_config", "task_type", *CHOOSING,
}  # fmt: skip


def metadata(model: nn.Module) -> dict[str, Any]:
    """What adapters a model has and on which base, in plain types."""
    found = list(named_injections(model))
    # PEFT chooses among its own by itself.
    active = active_adapters(model) if all(each.peft is None for _, each in found) else adapters(model)
    entries = [_entry(name, each, each.adapter_name in active) for name, each in found]
    return {"format_version": FORMAT_VERSION, "adapters": entries}


def _entry(name: str, injection: Injection, is_active: bool) -> dict[str, Any]:
    base = fingerprint(injection)
    return {
        "module": name,
        "adapter_name": injection.adapter_name,
        "config": injection.config.to_dict(),
        "base_fingerprint": base.short,
        **({"base_samples": base.samples, "base_sketches": base.sketches} if base.samples is not None else {}),
        **({"base_config": base.config} if base.config else {}),
        **({"quantization": injection.quantization} if injection.quantization else {}),
        **({"beneath": injection.beneath} if injection.beneath else {}),
        **({"runs": injection.runs} if injection.runs else {}),
        **({} if is_active else {"active": False}),
        **({"peft": injection.peft} if injection.peft is not None else {}),
    }


def activate_as_saved(model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Choose the adapters that were active when a checkpoint was saved."""
    saved = [entry["adapter_name"] for entry in meta["adapters"] if entry.get("active", True)]
    if not any("peft" in entry for entry in meta["adapters"]) and {*saved} != {*active_adapters(model)}:
        set_adapter(model, list(dict.fromkeys(saved)) or None)


def check_metadata(model: nn.Module, meta: Mapping[str, Any], source: str, other_format: bool = False) -> None:
    """Require that saved adapters belong to this model's adapters and to this base; see :func:`require_same_base`.

    Raises:
        CheckpointError: If the format is newer, the settings differ in what the adapter computes, or the base differs.
    """
    require_known_format(meta, source)
    # Two injections may share module and name; then their targets tell them apart.
    saved = sorted(
        meta["adapters"], key=lambda entry: _identity(entry["module"], entry["adapter_name"], entry["config"])
    )
    here = sorted(
        named_injections(model), key=lambda item: _identity(item[0], item[1].adapter_name, item[1].config.to_dict())
    )
    saved_names = [(entry["adapter_name"], entry["module"]) for entry in saved]
    names_here = [(injection.adapter_name, name) for name, injection in here]
    if saved_names != names_here:
        raise CheckpointError(
            f"{source} holds the adapters {_describe(saved_names)}, but this model has {_describe(names_here)}: give "
            "the LoRA callback the same module and adapter_name. Nothing was loaded."
        )
    for entry, (_, injection) in zip(saved, here):
        saved_by, here_by = entry.get("peft"), injection.peft
        if (saved_by is None) != (here_by is None):
            raise CheckpointError(
                f"{source} holds adapters that {'this package' if saved_by is None else 'PEFT'} had put in, and here "
                f"{'this package' if here_by is None else 'PEFT'} has: build the module as it was when the checkpoint "
                "was saved. Nothing was loaded."
            )
        there, here_too = _binding(config_of(entry, source)), _binding(injection.config)
        if saved_by is not None and here_by is not None:
            there, here_too = (_binding_in_peft(each) for each in (saved_by, here_by))
        different = [
            f"{name} ({there.get(name)!r} saved, {here_too.get(name)!r} here)"
            for name in {**there, **here_too}
            if there.get(name) != here_too.get(name)
        ]
        if different:
            raise CheckpointError(
                f"{source} was saved with other LoRA settings: {', '.join(different)}. The adapter would compute "
                "something else, so use the settings with which it was saved. Nothing was loaded."
            )
        beneath = ", ".join(f"{each['adapter_name']!r}" for each in entry.get("beneath", []))
        require_same_base(
            Base(_fingerprint_in(entry), entry.get("quantization", [])),
            Base(fingerprint(injection), injection.quantization),
            source,
            f"Into that base, the adapter {beneath} had been merged for good. " if beneath else "",
            other_format,
        )


def runs_in(meta: Mapping[str, Any]) -> list[str]:
    """Names of the runs that have trained what a checkpoint holds, the one that has written it last."""
    return list(dict.fromkeys(run for entry in meta["adapters"] for run in entry.get("runs", [])))


def _fingerprint_in(entry: Mapping[str, Any]) -> Fingerprint:
    names = ("base_fingerprint", "base_samples", "base_sketches", "base_config")
    return Fingerprint(*map(entry.get, names))  # type: ignore[arg-type]


class Base(NamedTuple):
    """What is known of a base.

    Attributes:
        fingerprint: Of its values.
        quantization: How they are quantized; see :func:`~lightning_lora.model.quantization.quantization`.
    """

    fingerprint: Fingerprint
    quantization: list[dict[str, Any]]


def require_same_base(saved: Base, here: Base, source: str, more: str = "", other_format: bool = False) -> None:
    """Require that an adapter was trained on the base that it is put on.

    One that was trained on a base in full precision may be put on the same one quantized, with a warning that says how
    far they are apart.

    Args:
        saved: What it was trained on.
        here: What it is put on.
        source: What holds the adapter.
        more: What else is known of its base, for errors.
        other_format: Whether it may go, with this warning, on the same base in any format.

    Raises:
        CheckpointError: If it is another base.
    """
    try:
        if saved.fingerprint.fits(here.fingerprint):
            if _settings(saved.quantization) == _settings(here.quantization):
                computed = bool(here.quantization)
                _require_unedited(saved.fingerprint.edits(here.fingerprint, computed), source)
            return
    except ValueError as error:
        raise CheckpointError(f"{source} is damaged: {error} Take another copy of it. Nothing was loaded.") from error
    there, here_too = described(saved.quantization), described(here.quantization)
    layers = sum(entry.get("layers", 0) for entry in (*saved.quantization, *here.quantization))
    differs = _settings(saved.quantization) != _settings(here.quantization)
    apart = saved.fingerprint.apart(here.fingerprint) if differs else None
    may_differ = other_format or not saved.quantization
    if may_differ and apart is not None and apart.tensors <= layers and apart.distance <= _QUANTIZED_APART:
        rank_zero_warn(
            f"{source} was trained on a base that was {there}, and this one is {here_too}: {apart.tensors} of its "
            f"tensors are {apart.distance:.1%} apart, so the adapter does not compute quite what it learned."
        )
        return
    raise CheckpointError(
        f"{source} was trained on another base model: its fingerprint is {saved.fingerprint}, this model's is "
        f"{here.fingerprint}. "
        + (f"That base was {there}, and this one is {here_too}. " if differs else "")
        + "Build the model from the pretrained weights that the adapter was trained on"
        + (", quantized as they were" if differs else "")
        + f"; if this very model was merged before, unmerge it first. {more}Nothing was loaded."
    )


def _require_unedited(edits: list[str], source: str) -> None:
    """Require the very base, but for how positions are counted, which may be extended on purpose: that is said."""
    positions = [edit for edit in edits if edit.startswith("rope")]
    others = [edit for edit in edits if edit not in positions]
    if others:
        raise CheckpointError(
            f"{source} was trained on a base that was not quite this one, which has its tensors and other values in "
            f"{listed(others)}. Build the model from the pretrained weights and settings that the adapter was trained "
            "on. Nothing was loaded."
        )
    if positions:
        rank_zero_warn(f"{source} was trained on a base with other positions: {listed(positions)}.")


def _settings(quantization: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: entry[name] for name in entry if name != "bytes"} for entry in quantization]


def require_known_format(meta: Any, source: str) -> None:
    """Require metadata that this version can read, with all in it that it must hold.

    Raises:
        CheckpointError: If a newer version wrote it, or if it is damaged.
    """
    require_type(meta, dict[str, Any], source, "lightning_lora")
    version = meta.get("format_version", 0)
    require_type(version, int, source, "lightning_lora.format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has format version {version}, and this version of lightning-lora reads up to "
            f"{FORMAT_VERSION}: update lightning-lora. Nothing was loaded."
        )
    require_type(meta, Metadata, source, "lightning_lora")
    for number, entry in enumerate(meta["adapters"]):
        config_of(entry, f"{source}, in lightning_lora.adapters[{number}].config,")


def config_of(entry: Mapping[str, Any], source: str) -> LoraConfig:
    """The settings of an adapter.

    Raises:
        CheckpointError: If one is of another type than it must be, or no value that it can have.
    """
    hints = get_type_hints(LoraConfig)
    for name, value in entry["config"].items():
        require_type(value, hints.get(name, Any), source, name)
    try:
        return LoraConfig.from_dict(entry["config"])
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be read: {error} Nothing was loaded.") from error


def _binding(config: LoraConfig) -> dict[str, Any]:
    """The settings that change what given tensors compute."""
    start = (config.init_lora_weights, config.seed) if config.takes_from_base or config.use_vera else (True, 0)
    return {name: getattr(config, name) for name in _BINDING} | dict(zip(("init_lora_weights", "seed"), start))


def _binding_in_peft(adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same of PEFT's adapters, whose names tell which they are; which layers there are, the tensors say."""
    return {
        f"{adapter}.{name}": value
        for adapter, settings in adapters.items()
        for name, value in settings.items()
        if name not in _FREE_IN_PEFT and not name.endswith("dropout")
    }


def _identity(module: str, adapter_name: str, config: dict[str, Any]) -> tuple[str, str, str]:
    return module, adapter_name, str(config.get("target_modules"))


def _describe(names: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name!r} on {module or 'the whole module'}" for name, module in names) or "none"
