"""PEFT's adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, out and in.

A tensor is named ``base_model.model.<module>.lora_A.weight``, with the module's name in the model that PEFT would wrap:
the transformers model where there is one. https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.checkpoint import KEY, inject_from_checkpoint, read_checkpoint
from lightning_lora.formats.dcp import is_directory
from lightning_lora.formats.metadata import Base, check_metadata, require_same_base
from lightning_lora.formats.model_card import Run, has_own_card, write_card
from lightning_lora.formats.open_file import Objects, path_or_url
from lightning_lora.formats.peft_config import peft_adapters, peft_config
from lightning_lora.formats.peft_files import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    PeftFiles,
    layers_in,
    read_files,
    write_weights,
)
from lightning_lora.formats.peft_own import PeftAdapter, adapters_of_peft
from lightning_lora.formats.peft_variants import as_plain_lora, same_but_for_rounding
from lightning_lora.formats.portable import as_portable, not_portable
from lightning_lora.formats.publish import whole_directory
from lightning_lora.formats.sizes import require_finite, require_sizes, rows_in_peft
from lightning_lora.formats.verified import verify_adapter
from lightning_lora.fqn import listed
from lightning_lora.layers import Adapter, kind_of
from lightning_lora.layers.adapted_class import base_class
from lightning_lora.layers.offloading import onloaded
from lightning_lora.model.fingerprint import Fingerprint, fingerprint_in
from lightning_lora.model.inject import inject
from lightning_lora.model.multi_adapter import adapters, add_adapter, delete_adapter
from lightning_lora.model.peft_wrapped import base_fingerprint, base_model
from lightning_lora.model.record import Injection, injections
from lightning_lora.model.removed import restored
from lightning_lora.model.state_dict import (
    CheckpointError,
    adapter_tensors,
    check_adapters,
    check_tensors,
    scatter,
    trained_only,
)
from lightning_lora.model.targets import matches, models_with_files, modules_by_name
from lightning_lora.sharding import full_tensor, is_writer, load_full, named_tensors, unsharded

Layout = Literal["peft", "portable"]


def save_adapter(
    model: nn.Module, directory: str | Path, adapter_name: str | None = None, *, layout: Layout = "peft"
) -> Path:
    """Write an adapter of a model as a directory that PEFT opens. It has all files, or is as it was before.

    Args:
        model: A model with adapters, of which ``modules_to_save`` are stored too.
        directory: Made if it is not there.
        adapter_name: Which adapter; may be left out if there is one.
        layout: ``"peft"`` writes ranks and scalings as they were trained. ``"portable"`` gives all layers one rank, by
            zeros, and a scaling of one, whose rest goes into B: the same update, for servers that read ``r`` and
            ``lora_alpha`` alone, or neither.

    Returns:
        The directory.

    Raises:
        ValueError: If the model has no such adapter, or several to choose from, or if it has more than the portable
            layout can hold: DoRA, VeRA, biases, ``modules_to_save``, token rows or stacked parameters.
        CheckpointError: If the adapter holds a NaN or an infinity, or what was written, which is opened again before
            it takes its place, is not what is in memory.
    """
    with restored(model):
        return write_adapter(_find_injection(model, adapter_name), Path(directory), layout=layout)


def not_portable_of(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """What the portable layout cannot hold of an adapter of a model, in words; see :func:`save_adapter`."""
    settings, tensors, _ = adapter_contents(model, adapter_name)
    return not_portable(settings, tensors)


def adapter_contents(
    model: nn.Module, adapter_name: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module]:
    """What :func:`save_adapter` writes of an adapter, without writing it.

    Returns:
        The settings, the tensors under PEFT's names, and the model that these are the names in.
    """
    with restored(model):
        injection = _find_injection(model, adapter_name)
        if injection.peft is not None:
            (found,) = _required_one(adapters_of_peft(injection.root)).values()
            return found.settings, found.tensors, base_model(injection.root)
        prefix = _peft_root(injection)
        base = injection.root.get_submodule(prefix.rstrip("."))
        return peft_config(injection, prefix), _tensors_of(injection, prefix), base


def write_adapter(injection: Injection, directory: Path, run: Run | None = None, layout: Layout = "peft") -> Path:
    """Write the adapter of one injection, and a card; see :func:`save_adapter`.

    Args:
        injection: The injection.
        directory: Made if it is not there.
        run: What the card says of the training run.
        layout: How ranks and scalings are written.
    """
    if injection.peft is not None:
        every = adapters_of_peft(injection.root)
        for name, each in every.items():
            below = directory / name if len(every) > 1 else directory
            require_finite(each.tensors, "The adapter", f"Nothing was written to {below}.")
            base = base_fingerprint(injection.root, name)
            _write(below, each.settings, each.tensors, base, None, injection, run, layout)
        return directory
    prefix = _peft_root(injection)
    tensors = _tensors_of(injection, prefix)
    require_finite(_without_buffers(injection, tensors), "The adapter", f"Nothing was written to {directory}.")
    base = fingerprint_in(injection, prefix)
    if not is_writer(injection.root):
        return directory
    _warn_of_what_peft_misreads(injection, directory)
    start = str(injection.config.init_lora_weights) if injection.config.quantizes_base else None
    _write(directory, peft_config(injection, prefix), tensors, base, start, injection, run, layout)
    return directory


def _write(
    directory: Path,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    base: Fingerprint,
    start: str | None,
    injection: Injection,
    run: Run | None,
    layout: Layout,
) -> None:
    in_memory = [(adapter.layer_name, adapter) for _, adapter in peft_adapters(injection)]
    if layout == "portable":
        (settings, tensors), in_memory = as_portable(settings, tensors), []  # which has a scaling of its own
    with whole_directory(directory) as new:
        write_weights(new / WEIGHTS_FILE, tensors, base, start, injection.quantization)
        (new / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        prefix = len(_peft_root(injection))
        verify_adapter(new, settings, tensors, [(name[prefix:], adapter) for name, adapter in in_memory])
        if not has_own_card(directory):
            write_card(new, settings, run)


def _required_one(adapters: dict[str, PeftAdapter]) -> dict[str, PeftAdapter]:
    if len(adapters) != 1:
        raise ValueError(f"One adapter is asked for, and PEFT has put in {listed(list(map(repr, adapters)))}.")
    return adapters


def _tensors_of(injection: Injection, prefix: str) -> dict[str, Tensor]:
    with _full_adapters(injection):
        tensors = {
            # Cloned where they share memory, which safetensors refuses.
            PREFIX + peft_name[len(prefix) :]: tensor.detach().cpu().contiguous().clone()
            for peft_name, tensor in _peft_state_dict(injection, plain=True).items()
        }
    return {**tensors, **{name: tensor.clone() for name, tensor in _projections(injection).items()}}


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
        path: The directory or the ``.ckpt`` file, which may be a URL that fsspec opens.
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
    path = path_or_url(path)
    before = list(adapters(model))
    with _refused_as_a_whole(model, path):
        if isinstance(path, str) or not path.is_dir() or is_directory(path):
            objects: Objects = "open" if weights_only is False else "skip"
            _load_checkpoint(model, path, not before, objects, other_format)
            return model
        files = read_files(path)
        name = adapter_name or (before[0] if len(before) == 1 else "default")
        if name in before:
            _load_into(_find_injection(model, name), files, other_format)
            return model
        base = _base_of(files, model)
        config, tensors = as_plain_lora(files, base)
        require_sizes(base, config, tensors, rows_in_peft(tensors), PREFIX, str(path))
        if not before:
            inject(base, config, name)
        else:
            add_adapter(_find_injection(model, before[0]).root, config, name)
        _put(_find_injection(model, name), files, config, tensors, other_format)
    return model


def _base_of(files: PeftFiles, model: nn.Module) -> nn.Module:
    """The model that a file's names are those of: the only one of transformers or diffusers in it, or the whole."""
    inner = list(models_with_files(model).values())
    layers = layers_in(files.tensors)
    fitting = {each: len(modules_by_name(each).keys() & set(layers)) for each in [*inner, model]}
    return inner[0] if len(inner) == 1 and fitting[inner[0]] == max(fitting.values()) else model


@contextmanager
def _refused_as_a_whole(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Leave a model as it came if what is loaded does not fit it, and say so in errors of one kind."""
    before = list(adapters(model))
    try:
        yield
    except BaseException as error:
        for name in [each.adapter_name for each in injections(model) if each.peft is None]:
            if name not in before:
                delete_adapter(model, name)
        if isinstance(error, ValueError):
            raise CheckpointError(f"{path} does not fit this model: {error} Nothing was loaded.") from error
        raise


def read_adapter(injection: Injection, directory: Path) -> None:
    """Load a directory's tensors into the adapter of one injection; see :func:`load_adapter`."""
    with _refused_as_a_whole(injection.root, directory):
        _load_into(injection, read_files(directory))


def _load_into(injection: Injection, files: PeftFiles, other_format: bool = False) -> None:
    if injection.peft is not None:
        raise CheckpointError(
            f"PEFT has wrapped this model, so {files.directory} is for PEFT's own load_adapter. Nothing was loaded."
        )
    prefix = _peft_root(injection)
    config, tensors = as_plain_lora(files, injection.root.get_submodule(prefix.rstrip(".")))
    _put(injection, files, config, tensors, other_format)


def _put(
    injection: Injection, files: PeftFiles, saved: LoraConfig, tensors: dict[str, Tensor], other_format: bool
) -> None:
    """Require that an adapter is finite and of this kind and base, then take over its tensors."""
    require_finite(_without_buffers(injection, tensors), str(files.directory))
    _require_same_quantization(injection.config, saved, files.directory)
    _require_same_kind(injection, files.directory, saved)
    if files.fingerprint is not None:
        theirs = Base(files.fingerprint, files.quantization)
        here = Base(fingerprint_in(injection, _peft_root(injection)), injection.quantization)
        require_same_base(theirs, here, str(files.directory), other_format=other_format)
    _put_tensors(injection, tensors, str(files.directory))


def load_tensors(
    root: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: str, adapter_name: str
) -> nn.Module:
    """Put an adapter into a model, with tensors under PEFT's names for layers of this model.

    Raises:
        CheckpointError: If the tensors do not fit. Nothing is changed then.
    """
    with _refused_as_a_whole(root, Path(source)):
        inject(root, config, adapter_name)
        named = {PREFIX + name: tensor for name, tensor in tensors.items()}
        _put_tensors(_find_injection(root, adapter_name), named, source)
    return root


def _warn_of_what_peft_misreads(injection: Injection, directory: Path) -> None:
    read = [f"{name}.{inner}".lstrip(".") for name, layer in injection.layers() for inner in layer.beyond_peft()]
    modules = modules_by_name(injection.root)
    left_out = read + [name for name in injection.saved if name not in modules]
    misread: dict[str, list[str]] = {}
    if left_out:
        misread["adapts layers where they are called and trains whole modules, so it would leave out"] = left_out
    for name, layer in injection.layers():
        if (misrun := layer.misrun_by_peft()) is not None:
            misread.setdefault(f"0.21 {misrun}, and so would compute something else in", []).append(name)
    for what, names in misread.items():
        rank_zero_warn(
            f"PEFT {what} {listed(list(map(repr, names)))}. lightning_lora loads {directory} right; for others, export "
            "the merged model."
        )


def _put_tensors(injection: Injection, tensors: dict[str, Tensor], source: str) -> None:
    """Require that tensors under PEFT's names are those of the adapter, then take them over."""
    prefix = _peft_root(injection)
    with _full_adapters(injection):
        expected = _peft_state_dict(injection)
    expected = {PREFIX + name[len(prefix) :]: tensor for name, tensor in expected.items()}
    tensors = dict(tensors)
    for name, projection in _projections(injection).items():
        if not same_but_for_rounding(tensors.pop(name, projection), projection):
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
    name = injection.adapter_name
    adapters = [layer.lora[name] for _, layer in injection.layers() if name in layer.lora]
    modules = [module for adapter in adapters for module in adapter.modules()]
    with unsharded(modules), onloaded(modules):
        yield


def _require_same_quantization(here: LoraConfig, saved: LoraConfig, directory: Path) -> None:
    """Require that an adapter's base is quantized here as it was there."""
    there_as, here_as = (each.quantization for each in (saved, here))
    if there_as != here_as:
        bases = [
            f"a base under init_lora_weights={config.init_lora_weights!r}"
            if config.quantizes_base
            else "a base as it is"
            for config in (saved, here)
        ]
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
    for name, layer in injection.layers():
        read = layer.peft_targets(name[len(prefix) :]).get("target_parameters", [])
        if not all(matches(parameter, saved.target_parameters) for parameter in read):
            raise CheckpointError(
                f"{directory} has an adapter on the calls of {name!r}, to whose output PEFT adds it. This "
                f"{base_class(layer).__name__} computes something else than x W^T + b, so that would not be what is "
                "merged. Train one here, which adapts the weight where it is read. Nothing was loaded."
            )
    problems: dict[type[Adapter], str] = {}  # the first of each class
    for adapter in adapters:
        if problem := adapter.mismatch(saved, adapter.layer_name[len(prefix) :]):
            problems.setdefault(type(adapter), problem)
    if problems:
        raise CheckpointError(f"{directory} does not fit: {'; '.join(problems.values())}. Nothing was loaded.")


def _load_checkpoint(model: nn.Module, path: str | Path, fresh: bool, objects: Objects, other_format: bool) -> None:
    checkpoint = read_checkpoint(path, objects, "load_adapter(..., weights_only=False)")
    if fresh:
        inject_from_checkpoint(model, checkpoint, str(path))
    check_metadata(model, checkpoint[KEY], str(path), other_format)
    require_finite(trained_only(model, checkpoint["state_dict"]), str(path))
    expected = adapter_tensors(model)
    saved = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in expected}
    check_adapters(model, saved, str(path), alone=True)
    scatter(model, saved)


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
    for name, module, inner in named_tensors(injection.root, of_base=True) if names else ():
        if name in names:
            owner, _, attribute = name.rpartition(".")
            found[f"{wrapped.get(owner, owner)}.{attribute}".lstrip(".")] = (
                module,
                inner,
                None if injection.in_place else injection.aside[name],
            )
    return found


def _without_buffers(injection: Injection, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in the file, but for buffers, which may hold an infinity, as masks do."""
    prefix, saved = len(_peft_root(injection)), _saved_in_full(injection).items()
    buffers = {PREFIX + name[prefix:] for name, (module, inner, _) in saved if inner in module._buffers}
    return {name: tensor for name, tensor in tensors.items() if name not in buffers}


def _peft_root(injection: Injection) -> str:
    """The name, with a dot, of the model of transformers or diffusers that holds all that is trained; else none."""
    names = [*injection.targets, *injection.trained]
    for hf_name in models_with_files(injection.root):
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
