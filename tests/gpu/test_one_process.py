"""With a single process, FSDP2 makes the same run as no strategy, with the adapter alone in its checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers import toys
from helpers.models import tiny_llama
from helpers.toys import assert_adapter_only, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.saving import CpuFSDP
from lightning_lora import LoRA

pytestmark = pytest.mark.gpu


class Llama(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None and not self.losses:
            for block in self.model.model.layers:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.model(batch, labels=batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


@pytest.fixture(autouse=True)
def _no_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def strategy_of(name: str, device: str) -> Any:
    if name == "FSDP":
        return (FSDPStrategy if device == "cuda" else CpuFSDP)(auto_wrap_policy={LlamaDecoderLayer})
    return ModelParallelStrategy(1, 1, save_distributed_checkpoint=False) if name == "FSDP2" else "auto"


def run(name: str, device: str, path: Path, ckpt_path: Path | None = None, steps: int = 4) -> list[float]:
    module = Llama()
    trainer = toys.trainer(
        path,
        [LoRA(r=2, summary=False, merge=None), ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=2)],
        accelerator=device,
        strategy=strategy_of(name, device),
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=True,
        use_distributed_sampler=False,
    )
    rows = torch.randint(64, (2, 2, 8), generator=torch.Generator().manual_seed(1))  # two steps an epoch
    trainer.fit(module, DataLoader(list(rows), batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return module.losses


def test_fsdp2_trains_saves_and_resumes_as_without(device: str, tmp_path: Path) -> None:
    alone = run("alone", device, tmp_path / "alone")
    assert len(set(alone)) == len(alone)
    found = run("FSDP2", device, tmp_path / "FSDP2")
    assert found == pytest.approx(alone, abs=1e-4)
    assert_adapter_only(tmp_path / "FSDP2" / "step=2.ckpt", snapshot(Llama()))
    resumed = run("FSDP2", device, tmp_path / "resumed", ckpt_path=tmp_path / "FSDP2" / "step=2.ckpt")
    assert resumed == pytest.approx(alone[2:], abs=1e-4)


def test_fsdp_says_that_it_shards_nothing(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FSDP shards nothing here"):
        run("FSDP", device, tmp_path)
