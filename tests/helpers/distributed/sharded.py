"""Jobs on the small Llama, for ``processes.py``."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.harness import peak_bytes
from helpers.distributed.llama import Llama, build, loader, rows, trainer
from lightning_lora import LoRA, LoraConfig, adapter_state_dict, eject, inject, merge, unmerge
from lightning_lora.formats.merged import save_merged
from lightning_lora.model.record import injections


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
) -> dict[str, Any]:
    """Train, and save what came of it in the directory: ``<step>.ckpt`` of the end of each epoch and ``adapter.pt``."""
    path = Path(directory)
    settings = {"r": 2, **(lora or {})}
    module = Llama(**(model or {}), early=settings if early else None)
    start: dict[str, Any] = {}
    callback = _Lora(start, **settings, merge=merge, export_dir=path / "export" if export else None, summary=False)
    checkpoint = ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=4, save_last=True)
    run = trainer(path, strategy, [callback, checkpoint], max_steps=max_steps, max_epochs=-1)
    run.fit(module, loader(strategy), loader(strategy), ckpt_path=ckpt_path)
    if export and merge is not None:
        save_merged(module, path / "split", max_shard_size="128KB")
    if merge is None:
        state = {name: tensor.cpu() for name, tensor in adapter_state_dict(module).items()}
        if run.is_global_zero:
            torch.save(state, path / "adapter.pt")
        start["saving takes"] = peak_bytes(lambda: run.save_checkpoint(path / "again.ckpt"))
    return {"losses": module.losses, "step": run.global_step, **start}


class _Lora(LoRA):
    """Tells of the start."""

    def __init__(self, start: dict[str, Any], **settings: Any) -> None:
        super().__init__(**settings)
        self._start = start

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._start["initial"] = _digest(adapter_state_dict(pl_module))
        self._start["fingerprints"] = [injection.fingerprint.short for injection in injections(pl_module)]


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


def merge_after_a_forward_pass() -> dict[str, Any]:
    """By how much the outputs of a model differ once its adapters are folded in, and once they are out again.

    A forward pass without gradients leaves the outermost unit of FSDP2 whole.
    """
    dist.init_process_group("gloo")
    model, mesh = build(), init_device_mesh("cpu", (dist.get_world_size(),))
    inject(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "embed_tokens", "lm_head"]))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = {}
    with torch.no_grad():
        ids = rows().tensors[0][:4]
        base, before = build()(ids).logits, model(ids).logits
        for name, change in (("merge", merge), ("unmerge", unmerge), ("eject", partial(eject, merge=True))):
            change(model)
            model(ids)  # makes it whole again
            model.reshard()
            found[name] = float((model(ids).logits - before).abs().max())
    return {**found, "adapter": float((before - base).abs().max())}
