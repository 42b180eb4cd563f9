"""A short run with an adapter."""

from pathlib import Path
from typing import Any

from helpers import toys
from helpers.toys import Toy, loader
from lightning_lora import LoRA


def fit(tmp_path: Path, *callbacks: Any, model: Any = None, lora: Any = None, **kw: Any) -> tuple[Toy, Any]:
    model = model or Toy()
    trainer = toys.trainer(tmp_path, [lora or LoRA(r=2, summary=False), *callbacks], **kw)
    trainer.fit(model, loader(), loader())
    return model, trainer
