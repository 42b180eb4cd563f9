"""What a fit has written, and how large it is."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from torch import nn


def outputs(trainer: L.Trainer) -> Iterator[tuple[str, Path]]:
    """The newest checkpoint and what was exported, each with a name for it."""
    checkpoints = [
        path
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, Checkpoint)
        for name in ("last_model_path", "best_model_path")
        if getattr(callback, name, "") and (path := Path(getattr(callback, name))).exists()
    ]
    if checkpoints:
        yield "newest checkpoint", max(checkpoints, key=lambda path: path.stat().st_mtime)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if folder := getattr(callback, "export_dir", None):
            for name in ("adapter", "merged"):
                if (path := Path(folder) / name).exists():
                    yield f"exported {name}", path


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters, a shared one once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def file_bytes(path: Path) -> int:
    """Of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def megabytes(size: int) -> str:
    """A size in words."""
    return f"{size / 1e6:,.2f} MB"
