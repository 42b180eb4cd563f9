"""Runs that save, and a way in which a write is cut short."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import toys
from helpers.toys import Toy, loader
from lightning_lora import LoRA


class HalfSave:
    """``torch.save``, ended in the middle of the file for ``last.ckpt``."""

    def __init__(self, times: int) -> None:
        self.times, self.save = times, torch.save

    def __call__(self, content: Any, file: Any, *args: Any, **kw: Any) -> None:
        if "last.ckpt" not in str(getattr(file, "name", file)):
            self.save(content, file, *args, **kw)
            return
        self.save(content, buffer := io.BytesIO(), *args, **kw)
        written = buffer.getvalue()
        self.times -= 1
        if self.times < 0:
            file.write(written[: len(written) // 2])
            file.flush()
            self.end()
        file.write(written)

    def end(self) -> None:
        raise OSError("no space left")


def fit(
    path: Path,
    ckpt_path: Any = None,
    merge: str | None = "last",
    module: Any = None,
    export: Path | None = None,
    **kw: Any,
) -> Any:
    keep = ModelCheckpoint(path, save_top_k=0, save_last=True, every_n_train_steps=2)
    trainer = toys.trainer(path, [LoRA(r=2, summary=False, merge=merge, export_dir=export), keep], **kw)
    trainer.fit(module or Toy(), loader(), ckpt_path=ckpt_path)
    return trainer
