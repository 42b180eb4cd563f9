"""The seam to Lightning's strategies: the adapter alone in every path that saves, checks in every path that loads.

Lightning 2.6 calls no callback when it saves weights only (``ModelCheckpoint(save_weights_only=True)``), so the filter
cannot live in ``Callback.on_save_checkpoint``. Every path, with every strategy, goes through four public methods of the
strategy: ``lightning_module_state_dict``, ``save_checkpoint``, ``load_checkpoint`` and ``load_model_state_dict``. There
is no public way to plug into them, so the Trainer's strategy object takes on a subclass that overrides these four.
"""

from abc import ABC
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.formats.checkpoint import KEY, check_checkpoint, read_checkpoint
from lightning_lora.formats.dcp import is_directory, read_directory, split_optimizer
from lightning_lora.formats.metadata import metadata
from lightning_lora.formats.open_file import Objects, is_skipped, open_file, readable
from lightning_lora.formats.sizes import require_finite
from lightning_lora.model.removed import is_finished, restored
from lightning_lora.model.state_dict import (
    adapter_only,
    adapter_tensors,
    adapter_whole,
    load_saved,
    steady,
    trained_only,
)
from lightning_lora.trainer import atomic_save
from lightning_lora.trainer.instance_mixin import mix_into
from lightning_lora.trainer.optimizer_state import optimized_names, reordered
from lightning_lora.trainer.resume import RNG_KEY, run_rng_state

_OWN_FILES, _TRUSTS, _READ = "_lora_own_files", "_lora_trusts", "_lora_read"
_OPTIMIZED = "optimized"
_WAY_OUT = "weights_only=False to this run of the Trainer"
_SEAM = ("lightning_module_state_dict", "save_checkpoint", "load_checkpoint", "load_model_state_dict")


def install(strategy: Any, mixin: "type[AdapterCheckpoints]", keeps_finite: bool = True) -> None:
    """Make a Trainer's strategy save, check and load adapters alone, from now on.

    Args:
        strategy: The strategy.
        mixin: What it is to do differently.
        keeps_finite: Whether an adapter that is not finite is refused when a checkpoint is to be written.

    Raises:
        RuntimeError: If this version of Lightning has changed the seam.
    """
    absent = [name for name in _SEAM if not callable(getattr(strategy, name, None))]
    if absent:
        raise RuntimeError(
            f"{type(strategy).__name__} has no {', '.join(absent)}, through which lightning-lora keeps checkpoints "
            "small: it was made for Lightning 2.6, so install that version."
        )
    mix_into(strategy, mixin)
    strategy.keeps_finite = keeps_finite


class AdapterCheckpoints(ABC):
    """What a strategy does differently once its Trainer has a ``LoRA`` callback."""

    lightning_module: Any
    optimizers: list[Any]
    keeps_finite: bool

    @classmethod
    def require_compatible(cls, trainer: Any, lora: Any) -> None:
        """Require that the Trainer's callbacks can work under the strategy.

        Raises:
            ValueError: If one needs the whole model in every process, and does not have it.
        """
        return  # every process has it

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All of it, as hooks of the module that take entries out of it expect; a checkpoint gets less of it later."""
        if is_finished(self.lightning_module):
            return super().lightning_module_state_dict()  # type: ignore[misc,no-any-return]
        with restored(self.lightning_module):
            return super().lightning_module_state_dict()  # type: ignore[misc,no-any-return]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        if is_finished(self.lightning_module):
            self._make_whole(checkpoint, filepath)
        else:
            self._make_small(checkpoint)
        with atomic_save.writing(self, filepath) as path:
            super().save_checkpoint(checkpoint, path, *args, **kwargs)  # type: ignore[misc]
        own = vars(self).setdefault(_OWN_FILES, {})
        own.pop(str(filepath), None)
        own[str(filepath)] = None  # the latest last

    def last_checkpoint(self) -> str | None:
        """The latest checkpoint that this run has kept, or the one that it goes on from."""
        latest: str | None = next(reversed(vars(self).get(_OWN_FILES, {})), self.lightning_module.trainer.ckpt_path)
        return latest

    def remove_checkpoint(self, filepath: str | Path) -> None:
        super().remove_checkpoint(filepath)  # type: ignore[misc]
        vars(self).get(_OWN_FILES, {}).pop(str(filepath), None)

    def _make_whole(self, checkpoint: dict[str, Any], filepath: str | Path) -> None:
        """Leave the checkpoint of a finished run, whose model is plain and merged, whole, and say what is merged."""
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = []  # which are of the adapter
        with restored(self.lightning_module):
            checkpoint[KEY] = {**metadata(self.lightning_module), "merged": True}
        rank_zero_info(
            f"The run has ended and its model is merged, so {filepath} holds the whole model and can be loaded without "
            "LoRA. The adapter is in the checkpoints of the run, and save_adapter writes it."
        )

    def _make_small(self, checkpoint: dict[str, Any]) -> None:
        """Leave the adapter alone in a checkpoint, and add what it takes to go on with it."""
        with restored(self.lightning_module), steady(self.lightning_module):
            checkpoint["state_dict"] = self.small(checkpoint["state_dict"])
            if self.keeps_finite:
                trained = trained_only(self.lightning_module, checkpoint["state_dict"])
                require_finite(trained, "The adapter that was to be saved", "No checkpoint was written or replaced.")
            for holder, key in self.copies_in(checkpoint):
                holder[key] = adapter_only(self.lightning_module, holder[key])
            checkpoint[KEY] = metadata(self.lightning_module)
        if "optimizer_states" in checkpoint:
            checkpoint[KEY][RNG_KEY] = run_rng_state(self.lightning_module.trainer, checkpoint)
            checkpoint[KEY][_OPTIMIZED] = optimized_names(self.lightning_module, self.optimizers)
        if atomic_save.writes_directories(self) and "optimizer_states" in checkpoint:
            split = [split_optimizer(state_dict) for state_dict in checkpoint["optimizer_states"]]
            checkpoint["optimizer_states"] = [tensors for tensors, _ in split]
            checkpoint[KEY]["optimizers"] = [rest for _, rest in split]

    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trusted = False in (*args, kwargs.get("weights_only"))
        vars(self)[_TRUSTS] = trusted
        atomic_save.finish_writes(self)
        with readable(checkpoint_path, _WAY_OUT):
            objects: Objects = "open" if trusted else "refuse"
            if is_directory(checkpoint_path):
                checkpoint = read_directory(checkpoint_path, objects)
            elif atomic_save.writes_plain_files(self):
                checkpoint = open_file(checkpoint_path, objects)  # Lightning would open objects in what a URL gives
            else:
                checkpoint = self.read_file(checkpoint_path, *args, **kwargs)
        with steady(self.lightning_module):
            self._take(checkpoint, str(checkpoint_path))
        return checkpoint

    def _take(self, checkpoint: dict[str, Any], source: str) -> None:
        """Require that a checkpoint fits, and have it as Lightning and callbacks load it."""
        checkpoint["state_dict"] = check_checkpoint(self.lightning_module, checkpoint, source)
        require_finite(_moments(checkpoint), source)
        names = adapter_tensors(self.lightning_module)
        vars(self)[_READ] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
        for holder, key in self.copies_in(checkpoint):  # which callbacks load strictly, base and all
            full = self.lightning_module.state_dict()
            kept = adapter_only(self.lightning_module, full)
            holder[key] = {**{name: value for name, value in full.items() if name not in kept}, **holder[key]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint[KEY].get(_OPTIMIZED, [])
        here = optimized_names(self.lightning_module, self.optimizers)
        states = list(checkpoint["optimizer_states"])
        states[: len(saved)] = [reordered(*found) for found in zip(states, saved, here)]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})  # type: ignore[misc]

    def read_again(self, path: str | Path) -> dict[str, Any]:
        """Read a checkpoint that this run has kept, or one before it that it goes on from.

        Objects are opened in files that this very process has written, and where the run was told to open them.
        """
        trusted = str(path) in vars(self).get(_OWN_FILES, ()) or vars(self).get(_TRUSTS, False)
        if not (is_directory(path) or atomic_save.writes_plain_files(self)):
            return self.read_file(path, weights_only=False if trusted else None)
        checkpoint = read_checkpoint(path, "open" if trusted else "skip", _WAY_OUT)
        if is_skipped(checkpoint["state_dict"]):  # for the error
            read_checkpoint(path, "refuse", _WAY_OUT)
        return checkpoint

    def read_file(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a ``CheckpointIO`` of the user's own has kept."""
        return super().load_checkpoint(path, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def copies_in(self, checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
        """Where a checkpoint holds weights of the module: a dict and a key in it.

        Beside ``state_dict``, Lightning's averaging callbacks keep a second set, at the top or in their own state.
        """
        names = adapter_tensors(self.lightning_module).keys()
        for holder in (checkpoint, *checkpoint.get("callbacks", {}).values()):
            if isinstance(holder, dict):
                yield from ((holder, key) for key, value in list(holder.items()) if _holds(value, names))

    def small(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of the module's state dict, as hooks have left it."""
        return adapter_whole(self.lightning_module, state_dict)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what `load_checkpoint` has required. Outside of adapters, it is for Lightning to be strict or not."""

        def load(outside: dict[str, Any]) -> None:
            super(AdapterCheckpoints, self).load_model_state_dict(  # type: ignore[misc]
                {**checkpoint, "state_dict": outside}, strict=strict
            )

        # Hooks that give entries other names, as they did when these were saved, know nothing of adapters.
        with steady(self.lightning_module):
            found = adapter_only(self.lightning_module, checkpoint["state_dict"])
            load_saved(self.lightning_module, {**vars(self).pop(_READ, {}), **found}, load)


def _moments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What optimizers have noted for parameters, by a name for errors."""
    states = [found.get("state") for found in checkpoint.get("optimizer_states") or [] if isinstance(found, Mapping)]
    return {
        f"{key} of parameter {index} of optimizer {number}": value
        for number, state in enumerate(states)
        for index, entries in (state.items() if isinstance(state, Mapping) else ())
        for key, value in (entries.items() if isinstance(entries, Mapping) else ())
        if isinstance(value, Tensor) and value.dim() > 0
    }


def _holds(value: Any, names: Collection[str]) -> bool:
    return isinstance(value, Mapping) and all(name in value for name in names)
