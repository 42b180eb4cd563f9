"""KTO's reference point in each of several processes."""

from typing import Any

from torch import Tensor

from helpers import toys
from helpers.distributed.jobs import rank
from lightning_lora import LoRA
from lightning_lora.callbacks import BaseAsReference
from lightning_lora.data import PreferenceData
from lightning_lora.tasks import DPO


class Recorded(DPO):
    """Keeps what answers to other questions have gained here, and in the mean of all."""

    def _gained_by_others(self, batch: dict[str, Tensor]) -> Tensor:
        gained = super()._gained_by_others(batch)
        self.gained = gained.tolist()
        return gained

    def _mean_of_processes(self, values: Tensor) -> Tensor:
        mean = super()._mean_of_processes(values)
        self.mean = float(mean)
        return mean


def one_step(checkpoint: str, files: list[str]) -> dict[str, Any]:
    """Train one step on this process's own file."""
    lora = LoRA(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, summary=False, merge=None)
    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_steps": 1}
    trainer = toys.trainer("unused", [lora, BaseAsReference()], enable_checkpointing=False, **settings)
    module = Recorded(checkpoint, loss="kto", lr=0.0)
    trainer.fit(module, PreferenceData(files[rank()], checkpoint, val_fraction=0, batch_size=8))
    return {"gained": module.gained, "mean": module.mean}
