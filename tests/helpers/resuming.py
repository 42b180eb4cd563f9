"""Runs that are stopped and resumed, and how two of them compare."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import toys
from helpers.toys import Toy, assert_same_tensors, dataset
from lightning_lora import LoRA, adapter_state_dict


class ResumableLoader:
    """A shuffling loader with the ``state_dict`` interface, by which Lightning goes on in the middle of an epoch."""

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size, self.position, self.order = batch_size, 0, torch.empty(0, dtype=torch.long)
        self.resuming = False

    def __len__(self) -> int:
        return len(dataset()) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        if not self.resuming:
            self.order, self.position = torch.randperm(len(dataset())), 0
        self.resuming = False
        while self.position < len(self):
            rows = self.order[self.position * self.batch_size :][: self.batch_size]
            self.position += 1
            yield [tensor[rows] for tensor in dataset().tensors]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position, self.resuming = state["order"], state["position"], True


def train(path: Path, data: Any, *, ckpt_path: Any = None, stop: int = -1, seed: int = 1, **kw: Any) -> Any:
    """Train with dropout in the model and in the adapter; return the model with its adapter, and the Trainer."""
    torch.manual_seed(seed)
    model = Scheduled()
    lora = LoRA(r=2, lora_dropout=0.2, summary=False, merge=None)
    keep = ModelCheckpoint(path, filename="{step}", save_top_k=-1, **kw.pop("keep"))
    trainer = toys.trainer(path, [lora, keep], max_epochs=4, max_steps=stop, **kw)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


class Scheduled(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        assert self.trainer.estimated_stepping_batches  # which makes the loader before the progress is restored
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def assert_same_run(resumed: Any, whole: Any) -> None:
    assert_same_tensors(adapter_state_dict(resumed[0]), adapter_state_dict(whole[0]))
    assert resumed[1].global_step == whole[1].global_step
    for one, other in zip(resumed[1].optimizers[0].state.values(), whole[1].optimizers[0].state.values(), strict=True):
        assert_same_tensors(one, other)
    assert resumed[1].optimizers[0].param_groups[0]["lr"] == whole[1].optimizers[0].param_groups[0]["lr"]
