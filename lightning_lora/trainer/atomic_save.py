"""Checkpoints that are there in full or not at all: written under another name beside their own, and then renamed.

Lightning 2.6 writes a file in the directory for temporary files and moves it from there. Where that is another file
system, moving is copying, and a process that is killed meanwhile leaves half a file in the place of the last good one;
and where that is full, nothing is saved. The directories of sharded checkpoints it writes in their place.
"""

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_lora.class_names import is_a
from lightning_lora.formats import side_by_side
from lightning_lora.formats.dcp import write_checksums
from lightning_lora.formats.publish import partial_path, publish, whole_file
from lightning_lora.trainer.instance_mixin import mix_into

_ASYNC = "AsyncCheckpointIO"


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
        partial = Path(strategy.broadcast(str(partial_path(target)) if strategy.is_global_zero else ""))
        strategy.barrier("lightning_lora.trainer.atomic_save")
        yield partial
        if strategy.is_global_zero:  # whose write ends when all ranks have written
            write_checksums(partial)
            publish(partial, target)
        return
    if writes_plain_files(strategy):
        mix_into(_layers_of(strategy.checkpoint_io)[-1], AtomicFiles)
    yield filepath


def writes_plain_files(strategy: Any) -> bool:
    """Whether a checkpoint is just the file at its path, which a ``CheckpointIO`` of the user's own need not write."""
    # By name, so that the class of the package pytorch_lightning counts too.
    *wrappers, innermost = [type(layer).__name__ for layer in _layers_of(strategy.checkpoint_io)]
    return innermost == "TorchCheckpointIO" and all(name == _ASYNC for name in wrappers)


def finish_writes(strategy: Any) -> None:
    """Wait for what is written in the background, so that it can be read.

    Raises:
        BaseException: What such a write has raised.
    """
    for layer in _layers_of(strategy.checkpoint_io):
        if is_a(layer, _ASYNC):
            layer.teardown()  # it starts anew at the next write


def _layers_of(checkpoint_io: Any) -> list[Any]:
    """A ``CheckpointIO`` and those that it wraps, the innermost last."""
    inner = getattr(checkpoint_io, "checkpoint_io", None)
    return [checkpoint_io, *(_layers_of(inner) if inner is not None else [])]


class AtomicFiles(ABC):  # noqa: B024
    """What Lightning's ``TorchCheckpointIO`` does differently. It may run in the thread of ``AsyncCheckpointIO``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = _local(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
            return
        with whole_file(target) as partial, partial.open("wb") as file:
            side_by_side.save(checkpoint, file)


def writes_directories(strategy: Any) -> bool:
    """Whether a strategy writes checkpoints as directories to which every process contributes."""
    # FSDPStrategy and ModelParallelStrategy of Lightning 2.6 tell by these private attributes alone.
    sharded = getattr(strategy, "_state_dict_type", None) == "sharded"
    return sharded or bool(getattr(strategy, "_save_distributed_checkpoint", False))


def _local(path: str | Path) -> Path | None:
    filesystem, local = url_to_fs(str(path))
    return Path(local) if isinstance(filesystem, LocalFileSystem) else None
