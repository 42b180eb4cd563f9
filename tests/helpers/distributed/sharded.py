"""Jobs on the small Llama, for ``processes.py``."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, TensorDataset
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.harness import peak_bytes
from benchmarks.saving import CpuFSDP
from helpers.distributed.llama import Llama, ShardingLlama, build, loader, rows, trainer
from lightning_lora import LoRA, LoraConfig, adapter_state_dict, disabled, eject, inject, merge, set_adapter, unmerge
from lightning_lora.formats.merged import save_merged
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.record import injections
from lightning_lora.sharding import full_tensor, is_sharded, register_sharding


def fit(
    directory: str,
    strategy: str,
    ckpt_path: str | None = None,
    lora: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    max_steps: int = 8,
    merge: str | None = None,
    export: bool = False,
    early: bool = False,
    shard: bool = False,
) -> dict[str, Any]:
    """Train, and save what came of it in the directory: ``<step>.ckpt`` of the end of each epoch and ``adapter.pt``."""
    path = Path(directory)
    settings = {"r": 2, **(lora or {})}
    module = (ShardingLlama if shard else Llama)(**(model or {}), early=settings if early else None)
    start: dict[str, Any] = {}
    callback = _Lora(start, **settings, merge=merge, export_dir=path / "export" if export else None, summary=False)
    checkpoint = ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=4, save_last=True)
    run = trainer(path, strategy, [callback, checkpoint], max_steps=max_steps, max_epochs=-1)
    run.fit(module, loader(strategy), loader(strategy), ckpt_path=ckpt_path)
    if export and merge is not None and (run.is_global_zero or is_sharded(module)):
        save_merged(module, path / "split", max_shard_size="128KB")
    if merge is None:
        state = {name: tensor.cpu() for name, tensor in adapter_state_dict(module).items()}
        if run.is_global_zero:
            torch.save(state, path / "adapter.pt")
        # What gloo's threads free is not seen, so that a single save can seem to take more than it does.
        start["saving takes"] = min(peak_bytes(lambda: run.save_checkpoint(path / "again.ckpt")) for _ in range(4))
    return {"losses": module.losses, "step": run.global_step, **start}


class _Lora(LoRA):
    """Tells of the start."""

    def __init__(self, start: dict[str, Any], **settings: Any) -> None:
        super().__init__(**settings)
        self._start = start

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._start["initial"] = _digest(adapter_state_dict(pl_module))
        self._start["fingerprints"] = [fingerprint(injection).short for injection in injections(pl_module)]


def _digest(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(tensor.double().abs().sum()) for name, tensor in tensors.items()}


def several(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of :func:`fit`, or what it raised, for each of some settings."""
    results: list[Any] = []
    for settings in runs:
        try:
            results.append(fit(**settings))
        except (ValueError, RuntimeError, NotImplementedError) as error:  # what users are told
            results.append({"error": f"{type(error).__name__}: {error}"})
    return {"runs": results}


def fit_test_fit_under(directory: str, strategies: list[str]) -> dict[str, Any]:
    """What :func:`fit_test_fit` finds under each of some strategies."""
    return {strategy: fit_test_fit(f"{directory}/{strategy}", strategy) for strategy in strategies}


def fit_test_fit(directory: str, strategy: str) -> dict[str, Any]:
    """Train and merge, test as merged and from the checkpoint, and train on from it."""
    path = Path(directory)
    module = Llama()
    found: dict[str, Any] = {}
    for name, steps in (("first", 4), ("second", 8)):
        lora = LoRA(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], merge="last", summary=False)
        run = trainer(path, strategy, [lora, ModelCheckpoint(path, save_last=True)], max_steps=steps, max_epochs=-1)
        last = None if name == "first" else path / "last.ckpt"
        run.fit(module, loader(strategy), loader(strategy), ckpt_path=last)
        found[f"{name} merged"] = run.test(module, loader(strategy), verbose=False)[0]["test_loss"]
        found[f"{name} last"] = run.test(module, loader(strategy), ckpt_path="last", verbose=False)[0]["test_loss"]
    return {**found, "losses": module.losses}


def merge_after_a_forward_pass(kind: str) -> dict[str, Any]:
    """By how much the outputs of a model differ from what they should be, once its adapters are folded in, off, or out.

    A forward pass without gradients leaves the outermost unit whole, and under ``SHARD_GRAD_OP`` all of them.

    Args:
        kind: "fsdp2" or a sharding strategy of FSDP.
    """
    dist.init_process_group("gloo")
    model: nn.Module = build()
    inject(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "embed_tokens", "lm_head"]))
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = FSDP(
            model,
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            sharding_strategy=ShardingStrategy[kind],
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        register_sharding(model)
    found = {}
    with torch.no_grad():
        ids = rows().tensors[0][:4]
        base, before = build()(ids).logits, model(ids).logits
        with disabled(model):
            found["disabled"] = float((model(ids).logits - base).abs().max())
        found["enabled"] = float((model(ids).logits - before).abs().max())
        for name, change in (("merge", merge), ("unmerge", unmerge), ("eject", partial(eject, merge=True))):
            change(model)
            after = model(ids).logits  # makes it whole again
            if isinstance(model, FSDPModule):
                model.reshard()
                after = model(ids).logits
            found[name] = float((after - before).abs().max())
    return {**found, "adapter": float((before - base).abs().max())}


def inject_into_sharded_layers() -> dict[str, Any]:
    """What is left of trained biases once adapters in layers that are FSDP2 units themselves were off and on again."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    base, mesh = model[0].bias.detach().clone(), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    inject(model, LoraConfig(r=2, bias="lora_only", modules_to_save=None))
    with torch.no_grad():
        model[0].bias.add_(1)
    set_adapter(model, None)
    off = full_tensor(model[0], "bias")
    set_adapter(model, "default")
    on = adapter_state_dict(model)["0.bias"]
    return {"off": float((off - base).abs().max()), "on": float((on - base - 1).abs().max())}


class Switched(L.LightningModule):
    """A body and a head, sharded by FSDP2 in ``configure_model`` if there is a mesh."""

    def __init__(self, before: dict[str, Any] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), nn.Linear(8, 2)
        self.before = before  # settings to inject before the model is sharded
        self.found: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def configure_model(self) -> None:
        if self.before is not None:
            inject(self, LoraConfig(**self.before))
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            for module in (self.body, self.head, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - 3).square().mean()

    def on_train_end(self) -> None:
        x, model = torch.ones(2, 4), self.trainer.strategy.model
        with torch.no_grad():
            adapted, state = model(x), adapter_state_dict(self)
            with disabled(self):
                base = model(x)
            set_adapter(self, None)
            base_again = model(x)
            set_adapter(self, "default")
            again, state_again = model(x), adapter_state_dict(self)
        self.found = {
            "adapted again": float((again - adapted).abs().max()),
            "base again": float((base_again - base).abs().max()),
            "learned": float((adapted - base).abs().max()),
            "from the base": float((base - build_switched()(x)).abs().max().detach()),
            "state": max(float((state_again[name] - state[name]).abs().max()) for name in state),
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def build_switched() -> Switched:
    return Switched(None)


def switch(strategy: str, settings: dict[str, Any]) -> dict[str, float]:
    """By how much outputs and state differ once adapters were off and on again, after training under a strategy."""
    takes_from_base = settings.get("init_lora_weights") == "pissa"
    module = Switched(settings if takes_from_base else None)
    strategies = {
        "fsdp": lambda: CpuFSDP(auto_wrap_policy={nn.Sequential}),
        "fsdp2": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    }
    run = L.Trainer(
        max_steps=3, strategy=strategies[strategy](), devices=2, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LoRA(**settings, merge=None, summary=False)],
    )  # fmt: skip
    run.fit(module, DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=4))
    return module.found


def switch_all(strategies: list[str], settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`switch` finds for each of some strategies and settings."""
    return {f"{strategy}, {each}": switch(strategy, each) for strategy in strategies for each in settings}
