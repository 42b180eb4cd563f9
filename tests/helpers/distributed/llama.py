"""A small Llama on a fixed set of rows, and the strategies under which it is trained."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.saving import CpuFSDP
from helpers import toys
from helpers.quantized import quantize
from lightning_lora import LoraConfig, inject, param_groups
from lightning_lora.sharding import load_full
from lightning_lora.tasks import language_model_loss

VOCABULARY, ROWS, LENGTH, GLOBAL_BATCH = 200, 32, 8, 8
PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def build(tied: bool = False) -> LlamaForCausalLM:
    """The base, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
            )
        )  # fmt: skip


def on_meta(model: nn.Module) -> nn.Module:
    """Without its weights, which ``reset_parameters`` of each module brings back, as reading them from a file would."""

    def read(module: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            load_full(module, name, weight)

    for module in model.modules():
        weights = {name: tensor.detach().clone() for name, tensor in module.named_parameters(recurse=False)}
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight.to("meta")))
        buffers = {name: tensor.clone() for name, tensor in module.named_buffers(recurse=False)}
        module.reset_parameters = partial(read, module, {**weights, **buffers})
    return model


def rows() -> TensorDataset:
    return TensorDataset(torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)))


class Llama(L.LightningModule):
    """Fine-tunes :func:`build` on :func:`rows`.

    Args:
        late: Whether ``configure_model`` builds it.
        meta: Whether it is built on the meta device.
        early: Settings of LoRA to inject in ``configure_model``, before the model is sharded there.
        tied: Whether the output head is tied to the embedding.
        outermost: Whether what is outside of the blocks is sharded too.
        quantized: The kind of its quantized linear layers, if they are to be.
    """

    def __init__(
        self,
        late: bool = False,
        meta: bool = False,
        early: dict[str, Any] | None = None,
        tied: bool = False,
        outermost: bool = True,
        quantized: str | None = None,
    ) -> None:
        super().__init__()
        self.quantized = quantized
        self.early, self.meta, self.tied, self.outermost = early, meta, tied, outermost
        self.losses: list[float] = []
        self.model: Any = None if late else self._build()

    def _build(self) -> LlamaForCausalLM:
        model = build(self.tied)
        if self.quantized is not None:
            model = quantize(model, self.quantized)
        return on_meta(model) if self.meta else model

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._build()
        if self.early is not None:
            inject(self, LoraConfig(**self.early))
        if self.device_mesh is not None and not getattr(self, "sharded", False):
            self.sharded = True
            self.cut_up()

    def cut_up(self) -> None:
        mesh = self.device_mesh
        for block in self.model.model.layers:
            if mesh["tensor_parallel"].size() > 1:
                parallelize_module(block, mesh["tensor_parallel"], {name: cls() for name, cls in PLAN.items()})
            if mesh["data_parallel"].size() > 1:
                fully_shard(block, mesh=mesh["data_parallel"])
        if mesh["data_parallel"].size() > 1 and self.outermost:
            fully_shard(self.model, mesh=mesh["data_parallel"])

    def _loss(self, batch: list[Tensor]) -> Tensor:
        return language_model_loss(self.model, {"input_ids": batch[0], "labels": batch[0]})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(param_groups(self, lr=5e-3, weight_decay=0.5), eps=1e-4)


class ShardingLlama(Llama):
    """The same with a method for sharding that has the name by which adapters are put in before."""

    def cut_up(self) -> None:
        self.shard()

    def shard(self) -> None:
        super().cut_up()


class CpuHybrid(CpuFSDP):
    """Shards over two processes, as if they were one of several nodes."""

    def setup_environment(self) -> None:
        super().setup_environment()
        self.kwargs["process_group"] = dist.new_subgroups(2)[0], dist.new_subgroups(1)[0]


STRATEGIES: dict[str, Any] = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: CpuFSDP(auto_wrap_policy={LlamaDecoderLayer}),
    "fsdp sharded": lambda: CpuFSDP(auto_wrap_policy={LlamaDecoderLayer}, state_dict_type="sharded"),
    "fsdp SHARD_GRAD_OP": lambda: CpuFSDP(auto_wrap_policy={LlamaDecoderLayer}, sharding_strategy="SHARD_GRAD_OP"),
    "fsdp NO_SHARD": lambda: CpuFSDP(auto_wrap_policy={LlamaDecoderLayer}, sharding_strategy="NO_SHARD"),
    "fsdp HYBRID_SHARD": lambda: CpuHybrid(
        auto_wrap_policy={LlamaDecoderLayer}, sharding_strategy="HYBRID_SHARD", process_group=()
    ),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
    "fsdp2 distributed": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=True),
    "tp": lambda: ModelParallelStrategy(1, 2, save_distributed_checkpoint=False),
    "tp distributed": lambda: ModelParallelStrategy(1, 2, save_distributed_checkpoint=True),
    "fsdp2 and tp": lambda: ModelParallelStrategy(2, 2, save_distributed_checkpoint=False),
}
PARTS = {"one": 1, "tp": 1, "tp distributed": 1}  # into how many parts a global batch is dealt out; else two


def trainer(path: Path, strategy: str, callbacks: list[Any], **kw: Any) -> L.Trainer:
    devices = {"one": 1, "fsdp2 and tp": 4}.get(strategy, 2)
    return toys.trainer(
        path, callbacks, strategy=STRATEGIES[strategy](), devices=devices, use_distributed_sampler=False, **kw
    )


def loader(strategy: str) -> DataLoader:
    """Batches that together are the same global batches under every strategy."""
    parts = PARTS.get(strategy, 2)
    rank = int(os.environ.get("RANK", 0))
    part = {"one": 0, "tp": 0, "tp distributed": 0, "fsdp2 and tp": rank // 2}.get(strategy, rank)
    sampler = DistributedSampler(rows(), parts, part, shuffle=False)
    return DataLoader(rows(), batch_size=GLOBAL_BATCH // parts, sampler=sampler)
