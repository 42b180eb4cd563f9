"""The seam to Lightning's strategies: the adapter alone in every path that saves, checks in every path that loads.

Lightning 2.6 calls no callback when it saves weights only (``ModelCheckpoint(save_weights_only=True)``), so the filter
cannot live in ``Callback.on_save_checkpoint``. Every path, with every strategy, goes through four public methods of the
strategy: ``lightning_module_state_dict``, ``save_checkpoint``, ``load_checkpoint`` and ``load_model_state_dict``. There
is no public way to plug into them, so the Trainer's strategy object takes on a subclass that overrides these four.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.dcp import is_directory, read_directory
from lightning_lora.formats.metadata import check_metadata, require_known_format
from lightning_lora.fqn import clean_fqn
from lightning_lora.model.inject import inject
from lightning_lora.model.state_dict import (
    CheckpointError,
    check_tensors,
    saved_tensors,
)

KEY = "lightning_lora"
ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)


def check_checkpoint(module: pl.LightningModule, checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Require that a checkpoint holds exactly the adapters of this module, trained on this base.

    Returns:
        Its state dict, under the names that this module has for the tensors, whichever of the two was compiled.

    Raises:
        CheckpointError: Saying what was found and what was expected. Nothing is loaded then.
    """
    meta = _metadata_of(checkpoint, source)
    check_metadata(module, meta, source)
    expected = saved_tensors(module)
    own_names = {clean_fqn(name): name for name in expected}
    state_dict = {own_names.get(clean_fqn(name), name): value for name, value in checkpoint["state_dict"].items()}
    check_tensors(expected, state_dict, source)
    return state_dict


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read an adapter checkpoint that Lightning wrote, opening no pickled objects but plain types and tensors.

    Raises:
        CheckpointError: If it cannot be read so, or holds no adapter.
    """
    with readable(path):
        checkpoint = read_directory(path) if is_directory(path) else _read_file(path)
    require_known_format(_metadata_of(checkpoint, str(path)), str(path))
    return checkpoint


def _read_file(path: str | Path) -> dict[str, Any]:
    with get_filesystem(path).open(str(path), "rb") as file:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return checkpoint


def inject_from_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put the adapters into a bare model that a checkpoint has; their tensors are still to be loaded."""
    for entry in checkpoint[KEY]["adapters"]:
        inject(model.get_submodule(entry["module"]), LoraConfig.from_dict(entry["config"]), entry["adapter_name"])


def load_from_checkpoint(module_class: type[ModuleT], checkpoint_path: str | Path, **init_kwargs: Any) -> ModuleT:
    """Rebuild a LightningModule from its base and a small adapter checkpoint.

    Args:
        module_class: Its class, which builds the base model in ``__init__`` or ``configure_model``.
        checkpoint_path: A checkpoint that a Trainer with a ``LoRA`` callback wrote.
        init_kwargs: Arguments of the class, over the hyperparameters that the checkpoint holds.

    Returns:
        The module with the trained adapter active. To merge it, ``eject(module, merge=True)``.

    Raises:
        CheckpointError: If the file is unreadable, holds no adapter, or belongs to another base.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    with warnings.catch_warnings():
        # The base comes from the class itself, so that its absence from the file is no news.
        warnings.filterwarnings("ignore", ".*contains no parameters.*")
        warnings.filterwarnings("ignore", ".*not in the checkpoint.*")
        module = module_class.load_from_checkpoint(
            _as_file({**checkpoint, "state_dict": {}}), strict=False, weights_only=True, **init_kwargs
        )
    inject_from_checkpoint(module, checkpoint)
    module.load_state_dict(check_checkpoint(module, checkpoint, str(checkpoint_path)), strict=False)
    return module


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn what a damaged file, or one that holds more than tensors and plain types, raises into a CheckpointError."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (EOFError, OSError, pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0] if str(error) else 'it ends early'} "
            "The file is damaged or cut short, or holds more than tensors and plain types. Take another checkpoint. "
            "Nothing was loaded."
        ) from error


def _metadata_of(checkpoint: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    if KEY not in checkpoint:
        tensors = len(checkpoint.get("state_dict", ()))
        raise CheckpointError(
            f"{source} is no adapter checkpoint: it holds {tensors} tensors and no {KEY!r} entry, so it was saved "
            "without the LoRA callback. Load such full weights into the LightningModule before the Trainer gets it, "
            "and resume adapters from a checkpoint that a Trainer with the LoRA callback saved. Nothing was loaded."
        )
    meta: Mapping[str, Any] = checkpoint[KEY]
    return meta


def _as_file(checkpoint: dict[str, Any]) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return buffer
