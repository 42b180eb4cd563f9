"""Adapter checkpoints as Lightning writes them: read, checked against a model, and put on a base."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats import side_by_side
from lightning_lora.formats.dcp import is_directory, read_directory
from lightning_lora.formats.metadata import activate_as_saved, check_metadata, config_of, require_known_format
from lightning_lora.formats.open_file import Objects, is_skipped, open_file, readable
from lightning_lora.formats.schema import require_names, require_type
from lightning_lora.formats.sizes import has_own_values, require_finite, require_sizes, rows_in_checkpoint
from lightning_lora.fqn import clean_fqn
from lightning_lora.model.inject import inject
from lightning_lora.model.peft_wrapped import adopt_peft, wrapped_models
from lightning_lora.model.record import Injection, injections
from lightning_lora.model.removed import remove_adapter
from lightning_lora.model.state_dict import CheckpointError, check_adapters, load_saved, tensor_names, trained_only
from lightning_lora.model.targets import modules_by_name

KEY = "lightning_lora"
ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)


def check_checkpoint(module: pl.LightningModule, checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Require that a checkpoint holds exactly the adapters of this module, trained on this base.

    What is outside of where adapters were injected is left to whoever loads it.

    Returns:
        Its state dict, under the names that this module has for the tensors, whichever of the two was compiled.

    Raises:
        CheckpointError: Saying what was found and what was expected. Nothing is loaded then.
    """
    meta = _metadata_of(checkpoint, source)
    check_metadata(module, meta, source)
    saved = _state_dict_of(checkpoint, source)
    own_names = {clean_fqn(name): name for name in tensor_names(module)}
    state_dict = {own_names.get(clean_fqn(name), name): value for name, value in saved.items()}
    check_adapters(module, state_dict, source)
    require_finite(trained_only(module, state_dict), source)
    return state_dict


def read_checkpoint(path: str | Path, objects: Objects = "skip", way_out: str | None = None) -> dict[str, Any]:
    """Read an adapter checkpoint that Lightning wrote.

    Args:
        path: The file or directory.
        objects: What becomes of what is neither a tensor nor of a plain type, such as hyperparameters may be; see
            :func:`~lightning_lora.formats.open_file.open_file`. By default it is left out, and no code is run.
        way_out: How the caller can have them opened, for errors.

    Raises:
        CheckpointError: If it cannot be read so, or holds no adapter.
    """
    with readable(path, way_out):
        checkpoint: dict[str, Any] = read_directory(path, objects) if is_directory(path) else open_file(path, objects)
    require_type(checkpoint, dict[str, Any], str(path))
    meta = _metadata_of(checkpoint, str(path))
    if is_skipped(meta):
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: where it says what its adapters are, it holds more than tensors "
            "and plain types, so it was damaged or made up. Take another checkpoint. Nothing was loaded."
        )
    require_known_format(meta, str(path))
    _state_dict_of(checkpoint, str(path))
    return checkpoint


def inject_from_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Put the adapters into a bare model that a checkpoint has; their tensors are still to be loaded.

    Args:
        model: The model.
        checkpoint: What :func:`read_checkpoint` gave.
        source: Its file, for errors.

    Raises:
        CheckpointError: If they do not fit the model. Nothing is changed then.
    """
    done: list[Injection] = []
    require_known_format(_metadata_of(checkpoint, source), source)
    state_dict = _state_dict_of(checkpoint, source)
    try:
        for entry in checkpoint[KEY]["adapters"]:
            name, config = entry["adapter_name"], config_of(entry, source)
            root = _submodule(model, entry["module"], source)
            if "peft" in entry:
                _adopt(root, config, name, source)
                continue
            require_sizes(
                root,
                config,
                state_dict,
                rows_in_checkpoint(state_dict, entry["module"], name),
                f"{entry['module']}.".lstrip("."),
                source,
            )
            before = injections(root)
            inject(root, config, name)
            done += [injection for injection in injections(root) if injection not in before]
        activate_as_saved(model, checkpoint[KEY])
    except BaseException as error:
        for injection in reversed(done):
            remove_adapter(injection)
        if isinstance(error, ValueError):
            raise CheckpointError(f"{source} does not fit this model: {error} Nothing was loaded.") from error
        raise


def _adopt(root: nn.Module, config: LoraConfig, adapter_name: str, source: str) -> None:
    if wrapped_models(root).get("") is not root:
        raise CheckpointError(
            f"{source} holds the adapters of a model that PEFT had wrapped, and this {type(root).__name__} is not "
            "wrapped: build the module as it was when the checkpoint was saved. Nothing was loaded."
        )
    adopt_peft(root, config, adapter_name)


def _submodule(model: nn.Module, name: str, source: str) -> nn.Module:
    # Under the name that it has here, be it compiled or not.
    found = modules_by_name(model).get(clean_fqn(name))
    if found is None:
        raise CheckpointError(
            f"{source} has an adapter on {name!r}, and this {type(model).__name__} has no such module: build the "
            "module as it was when the checkpoint was saved. Nothing was loaded."
        )
    return found


def load_from_checkpoint(
    module_class: type[ModuleT],
    checkpoint_path: str | Path,
    *,
    weights_only: bool | None = None,
    strict: bool | None = None,
    **init_kwargs: Any,
) -> ModuleT:
    """Rebuild a LightningModule from its base and a small adapter checkpoint.

    Args:
        module_class: Its class, which builds the base model in ``__init__`` or ``configure_model``.
        checkpoint_path: A checkpoint that a Trainer with a ``LoRA`` callback wrote.
        weights_only: ``False`` opens what is neither a tensor nor of a plain type too, such as paths or classes among
            the hyperparameters. This can run code, so give it only for files that you trust.
        strict: Whether what is outside of ``LoRA(module=...)`` must have just the names of the module. By default, as
            the module's ``strict_loading`` says. Adapters always must.
        init_kwargs: Arguments of the class, over the hyperparameters that the checkpoint holds.

    Returns:
        The module with the trained adapter active. To merge it, ``eject(module, merge=True)``.

    Raises:
        CheckpointError: If the file is unreadable, holds no adapter, or belongs to another base.
    """
    objects: Objects = "open" if weights_only is False else "refuse"
    checkpoint = read_checkpoint(
        checkpoint_path,
        objects,
        "load_from_checkpoint(..., weights_only=False), or build the module yourself and load_adapter(module, path), "
        "which reads the adapter alone",
    )
    with warnings.catch_warnings():
        # The base comes from the class itself, so that its absence from the file is no news.
        warnings.filterwarnings("ignore", ".*contains no parameters.*")
        warnings.filterwarnings("ignore", ".*not in the checkpoint.*")
        module = module_class.load_from_checkpoint(
            _as_file({**checkpoint, "state_dict": {}}), strict=False, weights_only=objects == "refuse", **init_kwargs
        )
    inject_from_checkpoint(module, checkpoint, str(checkpoint_path))
    state_dict = check_checkpoint(module, checkpoint, str(checkpoint_path))
    is_strict = module.strict_loading if strict is None else strict
    load_saved(module, state_dict, lambda outside: module.load_state_dict(outside, strict=is_strict))
    return module


def _metadata_of(checkpoint: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    if KEY not in checkpoint:
        state_dict = checkpoint.get("state_dict")
        tensors = len(state_dict) if isinstance(state_dict, dict) else 0
        raise CheckpointError(
            f"{source} is no adapter checkpoint: it holds {tensors} tensors and no {KEY!r} entry, so it was saved "
            "without the LoRA callback, or by a finished run, whose model is merged. Load such full weights into the "
            "LightningModule before the Trainer gets it, and resume adapters from a checkpoint that a Trainer with the "
            "LoRA callback saved. Nothing was loaded."
        )
    meta: Mapping[str, Any] = checkpoint[KEY]
    if isinstance(meta, Mapping) and meta.get("merged"):
        raise CheckpointError(
            f"{source} is no adapter checkpoint: it holds the whole model of a finished run, with its adapters merged "
            "in. Load it without LoRA, as by MyModule.load_from_checkpoint, or take a checkpoint that the run wrote "
            "before its end. Nothing was loaded."
        )
    return meta


def _state_dict_of(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    require_type(checkpoint.get("state_dict"), dict[str, Any], source, "state_dict")
    state_dict: dict[str, Any] = checkpoint["state_dict"]
    require_names(state_dict, source)
    ours = {name: value for name, value in state_dict.items() if ".lora." in f".{name}" or "lora_" in name}
    made_up = [name for name, value in ours.items() if not has_own_values(value)]
    if made_up:
        raise CheckpointError(
            f"{source} is damaged or was made up: {made_up[0]!r} has fewer values in the file than its shape "
            f"{tuple(state_dict[made_up[0]].shape)} asks for. Take another copy of it. Nothing was loaded."
        )
    return state_dict


def _as_file(checkpoint: dict[str, Any]) -> io.BytesIO:
    buffer = io.BytesIO()
    side_by_side.save(checkpoint, buffer)
    buffer.seek(0)
    return buffer
