"""The seam to Lightning's strategies: the adapter alone in every path that saves, checks in every path that loads.

Lightning 2.6 calls no callback when it saves weights only (``ModelCheckpoint(save_weights_only=True)``), so the filter
cannot live in ``Callback.on_save_checkpoint``. Every path, with every strategy, goes through four public methods of the
strategy: ``lightning_module_state_dict``, ``save_checkpoint``, ``load_checkpoint`` and ``load_model_state_dict``. There
is no public way to plug into them, so the Trainer's strategy object takes on a subclass that overrides these four.
"""

import io
import pickle
import warnings
from abc import ABC
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import nn

from lightning_lora import atomic
from lightning_lora.config import LoraConfig
from lightning_lora.directories import is_directory, read_directory, split_optimizer
from lightning_lora.inject import inject
from lightning_lora.merging import unfolded
from lightning_lora.mixing import take_on
from lightning_lora.names import clean_name
from lightning_lora.rng import rng_state
from lightning_lora.state import (
    CheckpointError,
    adapter_state_dict,
    adapter_tensors,
    check_metadata,
    check_tensors,
    drop_base,
    kept_tensors,
    load_adapter_state_dict,
    metadata,
    require_known_format,
)

KEY = "lightning_lora"
RNG_KEY = "rng"
_SEAM = ("lightning_module_state_dict", "save_checkpoint", "load_checkpoint", "load_model_state_dict")

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)


def install(strategy: Any, mixin: "type[AdapterCheckpoints]") -> None:
    """Make a Trainer's strategy save, check and load adapters alone, from now on.

    Args:
        strategy: The strategy.
        mixin: What it is to do differently.

    Raises:
        RuntimeError: If this version of Lightning has changed the seam.
    """
    absent = [name for name in _SEAM if not callable(getattr(strategy, name, None))]
    if absent:
        raise RuntimeError(
            f"{type(strategy).__name__} has no {', '.join(absent)}, through which lightning-lora keeps checkpoints "
            "small: it was made for Lightning 2.6, so install that version."
        )
    take_on(strategy, mixin)


class AdapterCheckpoints(ABC):
    """What a strategy does differently once its Trainer has a ``LoRA`` callback."""

    lightning_module: Any

    @classmethod
    def require_compatible(cls, trainer: Any, lora: Any) -> None:
        """Require that the Trainer's callbacks can work under the strategy.

        Raises:
            ValueError: If one needs the whole model in every process, and does not have it.
        """
        return  # every process has it

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with unfolded(self.lightning_module):
            return drop_base(self.lightning_module, super().lightning_module_state_dict())  # type: ignore[misc]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Union[str, Path], *args: Any, **kwargs: Any
    ) -> None:
        with unfolded(self.lightning_module):
            for holder, key in self.copies_in(checkpoint):
                holder[key] = drop_base(self.lightning_module, holder[key])
            checkpoint[KEY] = metadata(self.lightning_module)
        if "optimizer_states" in checkpoint:
            checkpoint[KEY][RNG_KEY] = _rng_state(self.lightning_module.trainer)
        if atomic.writes_directories(self) and "optimizer_states" in checkpoint:
            split = [split_optimizer(state_dict) for state_dict in checkpoint["optimizer_states"]]
            checkpoint["optimizer_states"] = [tensors for tensors, _ in split]
            checkpoint[KEY]["optimizers"] = [rest for _, rest in split]
        with atomic.writing(self, filepath) as path:
            super().save_checkpoint(checkpoint, path, *args, **kwargs)  # type: ignore[misc]

    def load_checkpoint(self, checkpoint_path: Union[str, Path], *args: Any, **kwargs: Any) -> dict[str, Any]:
        with readable(checkpoint_path):
            checkpoint = (
                read_directory(checkpoint_path)
                if is_directory(checkpoint_path)
                else self.read_file(checkpoint_path, *args, **kwargs)
            )
        checkpoint["state_dict"] = check_checkpoint(self.lightning_module, checkpoint, str(checkpoint_path))
        for holder, key in self.copies_in(checkpoint):
            holder[key] = {**self.lightning_module.state_dict(), **holder[key]}  # callbacks load theirs strictly
        return checkpoint

    def read_file(self, path: Union[str, Path], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint of a single file holds."""
        return super().load_checkpoint(path, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def copies_in(self, checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
        """Where a checkpoint holds weights of the module: a dict and a key in it.

        Beside ``state_dict``, Lightning's averaging callbacks keep a second set, at the top or in their own state.
        """
        names = adapter_state_dict(self.lightning_module).keys()
        for holder in (checkpoint, *checkpoint.get("callbacks", {}).values()):
            if isinstance(holder, dict):
                yield from ((holder, key) for key, value in list(holder.items()) if _holds(value, names))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state_dict = drop_base(self.lightning_module, checkpoint["state_dict"])
        # Not strict, since the base is absent on purpose; `load_checkpoint` has required all the rest.
        super().load_model_state_dict({**checkpoint, "state_dict": state_dict}, strict=False)  # type: ignore[misc]


def _holds(value: Any, names: Collection[str]) -> bool:
    return isinstance(value, Mapping) and all(name in value for name in names)


def check_checkpoint(module: pl.LightningModule, checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Require that a checkpoint holds exactly the adapters of this module, trained on this base.

    Returns:
        Its state dict, under the names that this module has for the tensors, whichever of the two was compiled.

    Raises:
        CheckpointError: Saying what was found and what was expected. Nothing is loaded then.
    """
    meta = _metadata_of(checkpoint, source)
    check_metadata(module, meta, source)
    expected = kept_tensors(module)
    own_names = {clean_name(name): name for name in expected}
    state_dict = {own_names.get(clean_name(name), name): value for name, value in checkpoint["state_dict"].items()}
    check_tensors(expected, state_dict, source)
    return state_dict


def read_checkpoint(path: Union[str, Path]) -> dict[str, Any]:
    """Read an adapter checkpoint that Lightning wrote, opening no pickled objects but plain types and tensors.

    Raises:
        CheckpointError: If it cannot be read so, or holds no adapter.
    """
    with readable(path):
        checkpoint = read_directory(path) if is_directory(path) else _read_file(path)
    require_known_format(_metadata_of(checkpoint, str(path)), str(path))
    return checkpoint


def _read_file(path: Union[str, Path]) -> dict[str, Any]:
    with get_filesystem(path).open(str(path), "rb") as file:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return checkpoint


def inject_as_saved(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put the adapters into a bare model that a checkpoint has; their tensors are still to be loaded."""
    for entry in checkpoint[KEY]["adapters"]:
        inject(model.get_submodule(entry["module"]), LoraConfig.from_dict(entry["config"]), entry["adapter_name"])


def load_from_checkpoint(module_class: type[ModuleT], checkpoint_path: Union[str, Path], **init_kwargs: Any) -> ModuleT:
    """Rebuild a LightningModule from its base and a small adapter checkpoint.

    Args:
        module_class: Its class, which builds the base model in ``__init__`` or ``configure_model``.
        checkpoint_path: A checkpoint that a Trainer with a ``LoRA`` callback wrote.
        init_kwargs: Arguments of the class, over the hyperparameters that the checkpoint holds.

    Returns:
        The module with the trained adapter at work. To fold it in, ``eject(module, merge=True)``.

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
    inject_as_saved(module, checkpoint)
    module.load_state_dict(check_checkpoint(module, checkpoint, str(checkpoint_path)), strict=False)
    return module


def make_loader_anew(trainer: pl.Trainer) -> None:
    """Have the training data loader made after the progress of a run is restored, not before.

    Lightning 2.6 gives a resumable loader its saved position when it makes the loader, and asking for
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes it before there is a position. There is no
    public way to have it made again; Lightning's learning-rate finder does it in this way too.

    Raises:
        RuntimeError: If this version of Lightning keeps the loader elsewhere.
    """
    if not hasattr(trainer.fit_loop, "_combined_loader"):
        raise RuntimeError(
            "Lightning's fit loop has no _combined_loader, through which lightning-lora resumes data loaders in the "
            "middle of an epoch: it was made for Lightning 2.6, so install that version."
        )
    trainer.fit_loop._combined_loader = None


def load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Load the adapter of the best checkpoint of the run that just ended.

    Raises:
        CheckpointError: If the run kept none.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        raise CheckpointError(
            'merge="best" needs a best checkpoint, and this run kept none: add '
            'ModelCheckpoint(monitor="val_loss") to the Trainer\'s callbacks, or use merge="last". The adapter of the '
            "last step is still in the model, unmerged."
        )
    checkpoint = read_checkpoint(path)
    state_dict = check_checkpoint(module, checkpoint, path)
    load_adapter_state_dict(module, {name: state_dict[name] for name in adapter_tensors(module)})


@contextmanager
def readable(path: Union[str, Path]) -> Iterator[None]:
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


def _rng_state(trainer: pl.Trainer) -> dict[str, Any]:
    batch_idx = trainer.fit_loop.batch_idx
    return {
        "mid_epoch": batch_idx >= 0 and not trainer.is_last_batch,
        "states": _rng_states_of_all_ranks(trainer),
    }


def _rng_states_of_all_ranks(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """One a rank, since dropout differs between them; none where the other ranks cannot be asked."""
    if trainer.world_size == 1:
        return [rng_state()]
    if trainer.interrupted or not torch.distributed.is_initialized():
        return []  # after an exception, this may be the only rank that saves
    states: list[Any] = [None] * trainer.world_size
    # Lightning's own `strategy.all_gather` takes tensors alone.
    torch.distributed.all_gather_object(states, rng_state())
    return states


def rng_to_restore(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> Optional[dict[str, Any]]:
    """The random state of this rank in a checkpoint, if that is of a run with as many processes."""
    saved: Optional[dict[str, Any]] = checkpoint.get(KEY, {}).get(RNG_KEY)
    if saved is None or len(saved["states"]) != trainer.world_size:
        return None
    return {"mid_epoch": saved["mid_epoch"], "state": saved["states"][trainer.global_rank]}
