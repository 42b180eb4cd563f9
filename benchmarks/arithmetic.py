"""What many GPUs hold and send with LoRA and without, on paper: memory, bytes per step and bytes per checkpoint.

Parameters are counted on the models themselves, built without weights (on the meta device). Each formula is checked
against what small runs hold and send, in ``tests/distributed/test_arithmetic.py``.

    python -m benchmarks.arithmetic
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoraConfig, inject

WORLDS = (8, 64)
FLOAT32, BFLOAT16 = 4, 2
CONFIGS = {
    "7B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A fine-tuning run with Adam, whose trained numbers, gradients and moments are float32.

    Attributes:
        frozen: How many numbers of the model are frozen.
        trained: How many are trained, adapters included.
        block: How many a transformer block has, without adapters.
        outside: How many are outside of all blocks: embedding, last norm and output head.
        frozen_bytes: Bytes of each frozen number in memory.
        sent_bytes: Bytes of each number that FSDP sends; 2 with ``Trainer(precision="bf16-mixed")``.
    """

    frozen: int
    trained: int
    block: int
    outside: int
    frozen_bytes: int = BFLOAT16
    sent_bytes: int = BFLOAT16

    def memory(self, world: int) -> float:
        """Bytes that a rank holds where FSDP cuts everything into ``world`` parts: weights, gradients and moments."""
        return (self.frozen * self.frozen_bytes + self.trained * (FLOAT32 + FLOAT32 + 2 * FLOAT32)) / world

    def memory_ddp(self) -> float:
        """Bytes that each rank holds under DDP, which keeps the gradients twice: also in the buckets that it sends."""
        return self.memory(1) + self.trained * FLOAT32

    def largest_unit(self) -> float:
        """Bytes of the largest part that FSDP has whole at once: a block, or all that is outside of blocks."""
        return max(self.block, self.outside) * self.sent_bytes

    def step_ddp(self, world: int) -> float:
        """Bytes that each rank receives in a step under DDP: the gradients are reduced, and the sums gathered."""
        return 2 * _of_others(world) * self.trained * FLOAT32

    def step_fsdp(self, world: int) -> float:
        """Bytes that each rank receives in a step under FSDP, ``FULL_SHARD``.

        Everything is gathered in the forward pass, and again in the backward pass, but what is outside of all blocks,
        which stays whole between them. Of gradients, those of the trained numbers alone are reduced.
        """
        gathered = 2 * (self.frozen + self.trained) - self.outside
        return _of_others(world) * (gathered + self.trained) * self.sent_bytes

    def checkpoint(self) -> float:
        """Bytes of the tensors in a checkpoint: what is trained, and its two moments."""
        return 3 * self.trained * FLOAT32

    def gathered_for_checkpoint(self, world: int) -> float:
        """Bytes that each rank receives for a checkpoint under FSDP; under DDP, the first rank has all."""
        return _of_others(world) * self.checkpoint()


def _of_others(world: int) -> float:
    """The share of a tensor that a rank does not have when each has an equal part, and so receives.

    All-gather and reduce-scatter move that much in a ring, and an all-reduce is one after the other; see "Bus
    bandwidth" in https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    """
    return (world - 1) / world


def lora_run(model: LlamaForCausalLM, r: int, **settings: int) -> Run:
    """LoRA on all linear layers of a model's blocks, into which it is injected."""
    full = full_run(model)
    trained = count(parameter for parameter in inject(model, LoraConfig(r=r)).parameters() if parameter.requires_grad)
    return dataclasses.replace(full, frozen=full.trained, trained=trained, **settings)


def full_run(model: LlamaForCausalLM, **settings: int) -> Run:
    """Full fine-tuning of a model."""
    trained, blocks = count(model.parameters()), model.model.layers
    return Run(0, trained, count(blocks[0].parameters()), trained - count(blocks.parameters()), **settings)


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they have."""
    return sum(parameter.numel() for parameter in parameters)


def tables(r: int = 16) -> list[str]:
    """The tables, in Markdown: memory, a step, a checkpoint."""
    memory: dict[str, list[float]] = {}
    step: dict[str, list[float]] = {}
    checkpoint: dict[str, list[float]] = {}
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            full, lora = full_run(LlamaForCausalLM(config)), lora_run(LlamaForCausalLM(config), r)
        in_float32 = dataclasses.replace(lora, frozen_bytes=FLOAT32)
        for what, run in (("LoRA", lora), ("LoRA, base in float32", in_float32), ("full fine-tuning", full)):
            memory[f"{name}, {what}"] = [run.memory_ddp(), *map(run.memory, WORLDS), run.largest_unit()]
        for what, run in (("LoRA", lora), ("full fine-tuning", full)):
            step[f"{name}, {what}"] = [*map(run.step_ddp, WORLDS), *map(run.step_fsdp, WORLDS)]
        checkpoint[f"{name}, LoRA"] = [lora.checkpoint(), *map(lora.gathered_for_checkpoint, WORLDS)]
        checkpoint[f"{name}, full fine-tuning"] = [full.checkpoint()]
    gpus = [f"{world} GPUs" for world in WORLDS]
    return [
        _table(["each GPU holds", "DDP", *(f"FSDP, {n}" for n in gpus), "FSDP's largest unit"], memory),
        _table(["each GPU receives in a step", *(f"{kind}, {n}" for kind in ("DDP", "FSDP") for n in gpus)], step),
        _table(["a checkpoint", "file", *(f"each GPU receives, FSDP, {n}" for n in gpus)], checkpoint),
    ]


def _table(headings: list[str], rows: dict[str, list[float]]) -> str:
    lines = [headings, ["---"] * len(headings)]
    for name, sizes in rows.items():
        cells = [f"{size / 1e9:,.2f} GB" for size in sizes]
        lines.append([name, *cells, *[""] * (len(headings) - 1 - len(cells))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(tables()))
