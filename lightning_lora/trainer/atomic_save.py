"""Checkpoints that are there in full or not at all: written under another name beside their own, and then renamed.

Lightning 2.6 writes a file in the directory for temporary files and moves it from there. Where that is another file
system, moving is copying, and a process that is killed meanwhile leaves half a file in the place of the last good one.
The directories of sharded checkpoints it writes in their place.
"""

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_lora.formats.publish import partial_path, publish, remove
from lightning_lora.trainer.instance_mixin import mix_into


@contextmanager
def writing(strategy: Any, filepath: str | Path) -> Iterator[str | Path]:
    """Have a strategy write the checkpoint in this block atomically, on all ranks.

    Remote files, and what a ``CheckpointIO`` of the user's own writes, are left as they are written.

    Args:
        strategy: The Trainer's strategy.
        filepath: Where the checkpoint belongs.

    Yields:
        The path to give to the strategy's ``save_checkpoint``.
    """
    if writes_directories(strategy):
        target = Path(strategy.broadcast(filepath))
        partial = partial_path(target)
        if strategy.is_global_zero:
            remove(partial)
        strategy.barrier("lightning_lora.trainer.atomic_save")
        yield partial
        if strategy.is_global_zero:  # whose write ends when all ranks have written
            publish(partial, target)
        return
    mend_files(strategy)
    yield filepath


def mend_files(strategy: Any) -> None:
    """Have Lightning's own reader and writer of single files do as :class:`AtomicFiles`, if the strategy uses it."""
    checkpoint_io = strategy.checkpoint_io
    # Some wrap another, as AsyncCheckpointIO does.
    while getattr(checkpoint_io, "checkpoint_io", None) is not None:
        checkpoint_io = checkpoint_io.checkpoint_io
    # By name, so that the class of the package pytorch_lightning counts too.
    if type(checkpoint_io).__name__ == "TorchCheckpointIO":
        mix_into(checkpoint_io, AtomicFiles)


class AtomicFiles(ABC):  # noqa: B024
    """What Lightning's ``TorchCheckpointIO`` does differently. It may run in the thread of ``AsyncCheckpointIO``."""

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", **kwargs: Any) -> dict[str, Any]:
        # Lightning's default is a function that does the same, but torch 2.13 rebuilds no subclasses of tensors by a
        # function, and optimizers keep their state in such (torchao's, in 8 bits).
        return super().load_checkpoint(path, map_location=map_location, **kwargs)  # type: ignore[misc,no-any-return]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        target = _local(path)
        if target is None:
            super().save_checkpoint(checkpoint, path, *args, **kwargs)  # type: ignore[misc]
            return
        partial = partial_path(target)
        try:
            super().save_checkpoint(checkpoint, str(partial), *args, **kwargs)  # type: ignore[misc]
            publish(partial, target)
        finally:
            remove(partial)


def writes_directories(strategy: Any) -> bool:
    """Whether a strategy writes checkpoints as directories to which every process contributes."""
    # FSDPStrategy and ModelParallelStrategy of Lightning 2.6 tell by these private attributes alone.
    sharded = getattr(strategy, "_state_dict_type", None) == "sharded"
    return sharded or bool(getattr(strategy, "_save_distributed_checkpoint", False))


def _local(path: str | Path) -> Path | None:
    filesystem, local = url_to_fs(str(path))
    return Path(local) if isinstance(filesystem, LocalFileSystem) else None
