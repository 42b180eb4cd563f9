"""What saving a checkpoint costs in memory where processes share the model: only the adapter is made whole.

Two processes train one step under each strategy and save. Beside it, the same with Lightning alone, which gathers the
whole model. Memory is the peak of a process's tensors while it saves, over those that it had before.

    python -m benchmarks.saving
    python -m benchmarks.saving --device cuda
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.harness import SHAPES, base, free_port, join, parser, peak_bytes, report
from lightning_lora import LoRA, LoraConfig, inject, lora_auto_wrap_policy

PROCESSES = 2
SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16}


class OneStep(L.LightningModule):
    """A Llama on one batch of random tokens.

    Args:
        shape: Its sizes.
        alone: Whether it puts the adapter in by itself, for want of the callback.
    """

    def __init__(self, shape: str, alone: bool) -> None:
        super().__init__()
        self.shape, self.alone = shape, alone

    def configure_model(self) -> None:
        self.model = base(SHAPES[self.shape])
        mesh = self.device_mesh
        if mesh is not None and mesh["tensor_parallel"].size() > 1:
            for block in self.model.model.layers:
                mlp = {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
                parallelize_module(block.mlp, mesh["tensor_parallel"], mlp)
        if self.alone:
            inject(self.model, LoraConfig(**SETTINGS))
        if mesh is not None and mesh["data_parallel"].size() > 1:
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(PROCESSES, 16, dtype=torch.long))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=1e-4)


class CpuFSDP(FSDPStrategy):
    """``FSDPStrategy`` on the CPU, which Lightning refuses to that very class alone, and FSDP unless it is told so."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


def strategies(device: str) -> dict[str, Callable[[], Strategy]]:
    fsdp = CpuFSDP if device == "cpu" else FSDPStrategy
    return {
        "FSDP": lambda: fsdp(auto_wrap_policy=lora_auto_wrap_policy(LlamaDecoderLayer)),
        "FSDP, sharded": lambda: fsdp(
            auto_wrap_policy=lora_auto_wrap_policy(LlamaDecoderLayer), state_dict_type="sharded"
        ),
        "FSDP2": lambda: ModelParallelStrategy(PROCESSES, 1, save_distributed_checkpoint=False),
        "FSDP2, sharded": lambda: ModelParallelStrategy(PROCESSES, 1, save_distributed_checkpoint=True),
        "tensor parallel": lambda: ModelParallelStrategy(1, PROCESSES, save_distributed_checkpoint=False),
    }


def one(rank: int, port: int, name: str, alone: bool, shape: str, device: str, file: str, done: Barrier) -> None:
    """Train one step in one of the processes, save, and write down what it took."""
    join(rank, PROCESSES, port)
    module = OneStep(shape, alone)
    trainer = L.Trainer(
        accelerator=device, devices=PROCESSES, strategy=strategies(device)[name](), max_steps=1, logger=False,
        callbacks=None if alone else [LoRA(**SETTINGS, merge=None, summary=False)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trainer.strategy.broadcast(folder)) / "saved.ckpt"
        extra = peak_bytes(lambda: trainer.save_checkpoint(path), device)
        everyone: list[Any] = [None] * PROCESSES
        dist.all_gather_object(everyone, extra)
        if rank == 0:
            files = [entry for entry in (path, *path.rglob("*")) if entry.is_file()]
            Path(file).write_text(json.dumps({"extra": everyone, "file": sum(f.stat().st_size for f in files)}))
        done.wait()  # not one of gloo's, which the first to end would break for the other
    os._exit(0)  # gloo's threads may still be at work


def sizes(shape: str) -> dict[str, int]:
    """Bytes of the base and of the adapter."""
    model = inject(base(SHAPES[shape], "meta"), LoraConfig(**SETTINGS))
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"base": sum(p.numel() * p.element_size() for p in model.parameters()) - adapter, "adapter": adapter}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=list(SHAPES), default="135M")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--strategies", nargs="*", default=list(strategies("cpu")))
    args: argparse.Namespace = made.parse_args()
    of = sizes(args.shape)
    rows: dict[str, dict[str, Any]] = {}
    for name in args.strategies:
        # Lightning's full state dict of FSDP crashes on the CPU, with torch 2.13.
        for alone in (False, True) if args.device != "cpu" or name != "FSDP" else (False,):
            with tempfile.NamedTemporaryFile() as found:
                done = torch.multiprocessing.get_context("spawn").Barrier(PROCESSES)
                torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
                    one, (free_port(), name, alone, args.shape, args.device, found.name, done), nprocs=PROCESSES
                )
                rows[f"{name}, {'Lightning alone' if alone else 'ours'}"] = {**of, **json.loads(found.read())}
    columns = ["base", "adapter", "extra, rank 0", "extra, rank 1", "over the adapter", "checkpoint"]

    def cells(row: dict[str, Any]) -> list[str]:
        megabytes = [f"{size / 1e6:.1f} MB" for size in (row["base"], row["adapter"], *row["extra"])]
        return [*megabytes, f"{max(row['extra']) / row['adapter']:.1f}", f"{row['file'] / 1e6:.1f} MB"]

    report("saving", args, rows, columns, cells)


if __name__ == "__main__":
    main()
