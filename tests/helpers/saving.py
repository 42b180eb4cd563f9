"""Runs that save, and a way in which a write is cut short."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import toys
from helpers.toys import Toy, loader
from lightning_lora import LoRA


class HalfMove:
    """``shutil.move`` as it is from one file system to another, ended in the middle of ``last.ckpt``."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, source: str, target: str) -> None:
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        self.times -= "last.ckpt" in target
        if self.times < 0:
            self.end()
        Path(target).write_bytes(content)
        Path(source).unlink()

    def end(self) -> None:
        raise OSError("no space left")


def fit(path: Path, ckpt_path: Any = None, merge: str | None = "last", module: Any = None, **kw: Any) -> Any:
    keep = ModelCheckpoint(path, save_top_k=0, save_last=True, every_n_train_steps=2)
    trainer = toys.trainer(path, [LoRA(r=2, summary=False, merge=merge), keep], **kw)
    trainer.fit(module or Toy(), loader(), ckpt_path=ckpt_path)
    return trainer
