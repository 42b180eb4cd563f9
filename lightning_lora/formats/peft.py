"""PEFT's adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, out and in.

A tensor is named ``base_model.model.<module>.lora_A.weight``, with the module's name in the model that PEFT would wrap:
the transformers model where there is one. https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.checkpoint import KEY, inject_from_checkpoint, read_checkpoint
from lightning_lora.formats.metadata import Base, check_metadata, require_same_base
from lightning_lora.formats.model_card import write_card
from lightning_lora.formats.open_file import Objects
from lightning_lora.formats.peft_config import CONFIG_FILE, config_from_peft, peft_adapters, peft_config
from lightning_lora.layers import Adapter, kind_of
from lightning_lora.layers.offloading import onloaded
from lightning_lora.model.fingerprint import Fingerprint, base_tensors, fingerprint_of
from lightning_lora.model.inject import inject
from lightning_lora.model.multi_adapter import adapters, add_adapter, delete_adapter
from lightning_lora.model.record import Injection, injections
from lightning_lora.model.removed import restored
from lightning_lora.model.state_dict import (
    CheckpointError,
    adapter_tensors,
    check_tensors,
    load_adapter_state_dict,
)
from lightning_lora.model.targets import pretrained_models
from lightning_lora.sharding import full_tensor, is_writer, load_full, named_tensors, unsharded

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FINGERPRINT, _SAMPLES = "lightning_lora_base_fingerprint", "lightning_lora_base_samples"
_QUANTIZATION = "lightning_lora_base_quantization"
_BASE = "lightning_lora_base"
_WRAPPED = re.compile(r"\.(original_module|modules_to_save)\.")


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> Path:
    """Write an adapter of a model as a directory that PEFT opens.

    Args:
        model: A model with adapters, of which ``modules_to_save`` are stored too.
        directory: Made if it is not there.
        adapter_name: Which adapter; may be left out if there is one.

    Returns:
        The directory.

    Raises:
        ValueError: If the model has no such adapter, or several to choose from.
    """
    with restored(model):
        return write_adapter(_find_injection(model, adapter_name), Path(directory))


def write_adapter(injection: Injection, directory: Path, run: Mapping[str, Any] | None = None) -> Path:
    """Write the adapter of one injection, and a card; see :func:`save_adapter`.

    Args:
        injection: The injection.
        directory: Made if it is not there.
        run: What the card says of the training run: names and values.
    """
    prefix = _peft_root(injection)
    with _full_adapters(injection):
        tensors = {
            # Cloned where they share memory, which safetensors refuses.
            PREFIX + peft_name[len(prefix) :]: tensor.detach().cpu().contiguous().clone()
            for peft_name, tensor in _peft_state_dict(injection, plain=True).items()
        }
    tensors.update({name: tensor.clone() for name, tensor in _projections(injection).items()})
    base = _fingerprint(injection, prefix)
    meta = {"format": "pt", _FINGERPRINT: base.short, **({_SAMPLES: base.samples} if base.samples is not None else {})}
    if injection.quantization:
        meta[_QUANTIZATION] = json.dumps(injection.quantization)
    if injection.config.quantizes_base:
        meta[_BASE] = str(injection.config.init_lora_weights)
    if not is_writer(injection.root):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, meta)
    settings = peft_config(injection, prefix)
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_card(directory, settings, run)
    return directory


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    *,
    weights_only: bool | None = None,
    other_format: bool = False,
) -> nn.Module:
    """Load an adapter: a directory in PEFT's format, or an adapter checkpoint that a Trainer wrote.

    A directory goes into the adapter of this name, which is put in first if the model has none: active in a model
    without adapters, else beside the others, to be chosen by :func:`~lightning_lora.set_adapter`. A checkpoint goes
    into the adapters that it was saved from, which are put in first into a model without adapters.

    Args:
        model: The base model, or the LightningModule that holds it.
        path: The directory or the ``.ckpt`` file.
        adapter_name: Of a directory. By default, that of the only adapter, or ``"default"``.
        weights_only: Of a checkpoint, the adapter alone is read, and objects beside it, such as hyperparameters may be,
            are left out unopened. ``False`` opens them too, which can run code; it helps where they cannot be left out.
        other_format: Whether the base may also be the same one in full precision or quantized otherwise, where the
            adapter was trained on a quantized one. A warning says how far they are apart.

    Returns:
        The same model.

    Raises:
        CheckpointError: If the files are damaged, or do not fit the model or its base. Nothing is loaded then.
    """
    path = Path(path)
    before = list(adapters(model))
    if path.is_dir():
        config = _read_config(path)
        name = adapter_name or (before[0] if len(before) == 1 else "default")
        if not before:
            hf_models = list(pretrained_models(model).values())
            inject(hf_models[0] if len(hf_models) == 1 else model, config, name)
        elif name not in before:
            add_adapter(_find_injection(model, before[0]).root, config, name)
    with _removed_after_failure(model, before):
        if path.is_dir():
            _load_tensors(_find_injection(model, name), path, config, other_format)
        else:
            objects: Objects = "open" if weights_only is False else "skip"
            _load_checkpoint(model, path, not before, objects, other_format)
    return model


@contextmanager
def _removed_after_failure(model: nn.Module, before: list[str]) -> Iterator[None]:
    """If what was put in cannot be loaded, leave the model as it came."""
    try:
        yield
    except CheckpointError:
        for name in [name for name in adapters(model) if name not in before]:
            delete_adapter(model, name)
        raise


def read_adapter(injection: Injection, directory: Path) -> None:
    """Load a directory's tensors into the adapter of one injection; see :func:`load_adapter`."""
    _load_tensors(injection, directory, _read_config(directory))


def _load_tensors(injection: Injection, directory: Path, saved: LoraConfig, other_format: bool = False) -> None:
    tensors, meta = read_tensors(directory)
    _require_same_quantization(injection.config, meta, directory)
    _require_same_kind(injection, directory, saved)
    prefix = _peft_root(injection)
    if _FINGERPRINT in meta:
        theirs = Base(Fingerprint(meta[_FINGERPRINT], meta.get(_SAMPLES)), quantization_in(meta))
        here = Base(_fingerprint(injection, prefix), injection.quantization)
        require_same_base(theirs, here, str(directory), other_format=other_format)
    _put_tensors(injection, tensors, str(directory))


def load_tensors(
    root: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: str, adapter_name: str
) -> nn.Module:
    """Put an adapter into a model, with tensors under PEFT's names for layers of this model.

    Raises:
        CheckpointError: If the tensors do not fit. Nothing is changed then.
    """
    before = list(adapters(root))
    inject(root, config, adapter_name)
    with _removed_after_failure(root, before):
        _put_tensors(
            _find_injection(root, adapter_name), {PREFIX + name: tensor for name, tensor in tensors.items()}, source
        )
    return root


def _put_tensors(injection: Injection, tensors: dict[str, Tensor], source: str) -> None:
    """Require that tensors under PEFT's names are those of the adapter, then take them over."""
    prefix = _peft_root(injection)
    with _full_adapters(injection):
        expected = _peft_state_dict(injection)
    expected = {PREFIX + name[len(prefix) :]: tensor for name, tensor in expected.items()}
    # With an adapted input or output embedding, PEFT writes the base's weight of it too.
    of_base = {
        f"{PREFIX}{name[len(prefix) :]}{wrapper}.base_layer.weight"
        for name in injection.targets
        for wrapper in ("", ".token_adapter")
    }
    tensors = {name: tensor for name, tensor in tensors.items() if name not in of_base}
    for name, projection in _projections(injection).items():
        if not _same_but_for_rounding(tensors.pop(name, projection), projection):
            raise CheckpointError(
                f"{source} has another {name} than seed={injection.config.seed} and r={injection.config.r} give here, "
                "and only that can be drawn again when a checkpoint resumes: it was made from another seed, for "
                "another rank or other layers, or by another generator. Nothing was loaded."
            )
    check_tensors(expected, tensors, source)
    own: list[tuple[nn.Module, str, Tensor, Tensor | None]] = []
    for name, (module, attribute, part) in _saved_in_full(injection).items():
        own.append((module, attribute, tensors[PREFIX + name[len(prefix) :]], part))
    for name, adapter in peft_adapters(injection):
        full_names = {inner: f"{name}.{inner}".lstrip(".")[len(prefix) :] for inner in adapter.peft_tensors()}
        theirs = {inner: tensors[PREFIX + full_name] for inner, full_name in full_names.items()}
        try:
            own += [(adapter, attribute, tensor, None) for attribute, tensor in adapter.from_peft(theirs).items()]
        except ValueError as error:
            raise CheckpointError(f"{source} does not fit the adapters of this model: {error}.") from error
    for module, attribute, tensor, destination in own:
        load_full(module, attribute, tensor, destination)


@contextmanager
def _full_adapters(injection: Injection) -> Iterator[None]:
    modules = [module for _, layer in injection.layers() for module in layer.lora.modules()]
    with unsharded(modules), onloaded(modules):
        yield


def _require_same_quantization(config: LoraConfig, meta: dict[str, str], directory: Path) -> None:
    """Require that an adapter's base is quantized here as it was there."""
    saved, here = meta.get(_BASE), str(config.init_lora_weights) if config.quantizes_base else None
    if saved != here:
        bases = [f"a base under init_lora_weights={start!r}" if start else "a base as it is" for start in (saved, here)]
        raise CheckpointError(
            f"{directory} was trained on {bases[0]}, and this model's adapter is on {bases[1]}: use the "
            "init_lora_weights with which it was saved. Nothing was loaded."
        )


def _require_same_kind(injection: Injection, directory: Path, saved: LoraConfig) -> None:
    """Require that the saved tensors would compute the same here as they did there."""
    prefix, adapters = _peft_root(injection), [adapter for _, adapter in peft_adapters(injection)]
    kinds = [adapters[0].describe(config) for config in (saved, injection.config)]
    if saved.kind != injection.config.kind or kinds[0] != kinds[1]:
        theirs = kind_of(saved).describe(saved)
        raise CheckpointError(
            f"{directory} holds {theirs}, and this model's adapter is {kinds[1]}: use the use_vera and seed "
            "(projection_prng_key), or adapter_kind, with which it was saved. Nothing was loaded."
        )
    problems: dict[type[Adapter], str] = {}  # the first of each class
    for adapter in adapters:
        if problem := adapter.mismatch(saved, adapter.layer_name[len(prefix) :]):
            problems.setdefault(type(adapter), problem)
    if problems:
        raise CheckpointError(f"{directory} does not fit: {'; '.join(problems.values())}. Nothing was loaded.")


def _same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to the precision of the coarser dtype."""
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (one, other))
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=eps, atol=1e-6)


def _load_checkpoint(model: nn.Module, path: Path, fresh: bool, objects: Objects, other_format: bool) -> None:
    checkpoint = read_checkpoint(path, objects, "load_adapter(..., weights_only=False)")
    if fresh:
        inject_from_checkpoint(model, checkpoint)
    check_metadata(model, checkpoint[KEY], str(path), other_format)
    expected = adapter_tensors(model)
    load_adapter_state_dict(model, {k: v for k, v in checkpoint["state_dict"].items() if k in expected})


def require_files(directory: Path) -> None:
    """Require both files of PEFT's format.

    Raises:
        CheckpointError: If one is not there.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}, so it is no adapter in PEFT's format: give the directory that holds "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}. Nothing was loaded."
            )


def fingerprint_in(meta: dict[str, str]) -> str | None:
    """The base's fingerprint in the metadata of a file, if this package wrote it."""
    return meta.get(_FINGERPRINT)


def quantization_in(meta: dict[str, str]) -> list[dict[str, Any]]:
    """How the base was quantized, in the metadata of a file of this package."""
    found: list[dict[str, Any]] = json.loads(meta.get(_QUANTIZATION, "[]"))
    return found


def _read_config(directory: Path) -> LoraConfig:
    """The settings of a directory in PEFT's format, of which both files must be there."""
    require_files(directory)
    config = config_from_peft(json.loads((directory / CONFIG_FILE).read_text()), directory)
    with _open(directory / WEIGHTS_FILE) as file:
        start = (file.metadata() or {}).get(_BASE)
    return dataclasses.replace(config, init_lora_weights=start) if start else config


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under PEFT's names, and the metadata of their file."""
    with _open(directory / WEIGHTS_FILE) as file:
        # With bias="all", PEFT writes the biases of modules_to_save twice more, under names of its own wrapper.
        keys = [key for key in file.keys() if not _WRAPPED.search(key)]  # noqa: SIM118
        return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged or cut short, so copy it again. Nothing was loaded."
        ) from error


def _find_injection(model: nn.Module, adapter_name: str | None) -> Injection:
    every = injections(model)
    found = [injection for injection in every if adapter_name in (None, injection.adapter_name)]
    if len(found) != 1:
        names = ", ".join(repr(injection.adapter_name) for injection in every)
        raise ValueError(
            f"PEFT's format holds one adapter, and this {type(model).__name__} has {len(found)}"
            + (f" named {adapter_name!r}" if adapter_name else "")
            + (
                f" ({names}): pass adapter_name, or the submodule that has one."
                if every
                else ": inject or load one first."
            )
        )
    return found[0].seen_from(model)


def _fingerprint(injection: Injection, prefix: str) -> Fingerprint:
    """The base's fingerprint under the names that it has in the model that PEFT would wrap."""
    tensors = base_tensors(injection)
    return fingerprint_of(
        each._replace(name=each.name[len(prefix) :]) for each in tensors if each.name.startswith(prefix)
    )


def _peft_state_dict(injection: Injection, plain: bool = False) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, before the prefix."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in peft_adapters(injection):
        for peft_name, tensor in (adapter.plain_tensors() if plain else adapter.peft_tensors()).items():
            tensors[f"{name}.{peft_name}".lstrip(".")] = tensor
    saved = _saved_in_full(injection)
    return {**tensors, **{name: full_tensor(*found) for name, found in saved.items()}}


def _saved_in_full(injection: Injection) -> dict[str, tuple[nn.Module, str, Tensor | None]]:
    """What is trained in full, under PEFT's names: its module, its name there, and what this process holds of it."""
    found: dict[str, tuple[nn.Module, str, Tensor | None]] = {}
    # PEFT wraps an adapted layer, whose own bias then is one level down.
    wrapped = {
        f"{name}{inner}": f"{name}{peft_inner}"
        for name, layer in injection.layers()
        for inner, peft_inner in layer.peft_wrapped().items()
    }
    names = {*injection.trained, *(name for name in injection.aside if injection.saves(name))}
    for name, module, inner in named_tensors(injection.root):
        if name in names:
            owner, _, attribute = name.rpartition(".")
            found[f"{wrapped.get(owner, owner)}.{attribute}".lstrip(".")] = (
                module,
                inner,
                None if injection.in_place else injection.aside[name],
            )
    return found


def _peft_root(injection: Injection) -> str:
    """The name, with a dot, of the transformers model that holds all that the injection trains; else none."""
    names = [*injection.targets, *injection.trained]
    for hf_name in pretrained_models(injection.root):
        if hf_name and all(name.startswith(f"{hf_name}.") for name in names):
            return f"{hf_name}."
    return ""


def _projections(injection: Injection) -> dict[str, Tensor]:
    """What the adapters of a kind share and PEFT stores once, under PEFT's names."""
    adapters = [adapter for _, adapter in peft_adapters(injection)]
    shared = {
        name: tensor
        for adapter_class in {type(adapter): None for adapter in adapters}
        for name, tensor in adapter_class.shared_tensors([a for a in adapters if type(a) is adapter_class]).items()
    }
    return {f"base_model.{name}": tensor for name, tensor in shared.items()}
