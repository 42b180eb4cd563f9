"""The gradients of a language model's steps over rows with unequal numbers of label tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers import toys
from helpers.distributed.jobs import rank
from lightning_lora import LoRA
from lightning_lora.tasks import CausalLM

LEARNED = (9, 2, 5, 1)


def rows() -> list[dict[str, Tensor]]:
    """One for each of :data:`LEARNED`, of which so many tokens are learned."""
    ids = torch.randint(7, 40, (len(LEARNED), 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, count in zip(labels, LEARNED):
        row[: 10 - count] = -100
    return [{"input_ids": ids[i], "labels": labels[i]} for i in range(len(LEARNED))]


class Recorded(CausalLM):
    """Keeps the gradients that its optimizer and the clipping before it get, and never moves."""

    def __init__(self, pretrained: str) -> None:
        super().__init__(pretrained, lr=0.0)
        self.steps: list[dict[str, Tensor]] = []

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        named = self.model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def gradients(folder: str, module: Recorded, dealt: list[Any], batch_size: int, **options: Any) -> list[Any]:
    """Those of each step of an epoch."""
    lora = LoRA(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="orthogonal", summary=False, merge=None)
    trainer = toys.trainer(folder, [lora], max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(dealt, batch_size=batch_size))
    return module.steps


def of_two_processes(folder: str, checkpoint: str) -> dict[str, Any]:
    """What the optimizer of this process gets, which has half of the rows."""
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    mine = rows()[2 * rank() : 2 * rank() + 2]
    (step,) = gradients(folder, Recorded(checkpoint), mine, 2, **settings)
    return {name: gradient.tolist() for name, gradient in step.items()}
