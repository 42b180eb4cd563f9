"""What tests run in several processes, see ``processes.py``: each function takes and returns plain JSON."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import toys
from helpers.toys import Toy, outputs, snapshot
from lightning_lora import LoRA, adapter_state_dict, inject, merge, unmerge
from lightning_lora.data.resumable import ResumableDataLoader


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def leave_torchrun() -> None:
    """Have Lightning start the processes itself. Does nothing in those that it has started, with this very job."""
    if os.environ.pop("TORCHELASTIC_RUN_ID", None):
        for name in (
            "MASTER_ADDR",
            "MASTER_PORT",
            "RANK",
            "LOCAL_RANK",
            "GROUP_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
        ):
            del os.environ[name]


def add_ranks(offset: int) -> dict[str, Any]:
    """Both processes meet over gloo."""
    dist.init_process_group("gloo")
    total: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(total, rank() + offset)
    dist.destroy_process_group()
    return {"rank": rank(), "total": sum(total)}


def outlast(directory: str) -> dict[str, Any]:
    """The first process is done at once; the second looks a second later whether it is still there."""
    place = Path(directory)
    if rank() == 0:
        (place / str(os.getpid())).touch()
        return {"there": True}
    while not (pids := [path.name for path in place.iterdir()]):  # for as long as the first takes to start
        time.sleep(0.1)
    time.sleep(1)
    return {"there": Path("/proc", pids[0]).exists()}


def fail_on_one() -> dict[str, Any]:
    if rank() == 1:
        raise ValueError("the second rank fails")
    return {}


def hang_with_a_child(directory: str) -> dict[str, Any]:
    """Leave the pids of this process and of one that it starts, and sleep for longer than any test."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(directory, f"{rank()}.pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


def killed_while_saving(directory: str) -> dict[str, Any]:
    from helpers import saving

    class Kill(saving.HalfSave):
        def end(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = Kill(times=2)
    saving.fit(Path(directory))
    return {}


def killed_while_saving_shards(directory: str, strategy: str) -> dict[str, Any]:
    """The first process dies in the middle of the second ``last.ckpt``."""
    from helpers.distributed.sharded import fit

    save, written = torch.save, []

    def save_half(content: Any, file: Any, **kw: Any) -> None:
        if isinstance(file, Path) and file.parent.match(".last.ckpt.*.partial"):
            written.append(file)
            if len(written) == 2:
                file.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        save(content, file, **kw)

    torch.save = save_half
    return fit(directory, strategy)


class Dying(Toy):
    """A toy of which one process kills itself, or raises, in the middle of a step."""

    def __init__(self, rank: int, step: int, how: str) -> None:
        super().__init__()
        self.dying = (rank, step, how)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        doomed, step, how = self.dying
        if rank() == doomed and self.global_step == step:
            if how == "raise":
                raise ArithmeticError("on purpose")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def train(
    directory: str, ckpt_path: str | None = None, seed: int = 1, dying: list[Any] | None = None
) -> dict[str, Any]:
    """Train in as many processes as there are, with dropout in the model and in the adapter, saving every three steps.

    Each rank draws other numbers, as the rank is in its seed.
    """
    random.seed(seed + rank())
    np.random.seed(seed + rank())
    torch.manual_seed(seed + rank())
    model = Dying(*dying) if dying else Toy()
    keep = ModelCheckpoint(directory, filename="{step}", save_top_k=-1, every_n_train_steps=3, save_last=True)
    trainer = toys.trainer(
        directory,
        [LoRA(r=2, lora_dropout=0.2, summary=False, merge=None), keep],
        devices=world_size(),
        strategy="ddp" if world_size() > 1 else "auto",
        max_epochs=4,
    )
    trainer.fit(model, ResumableDataLoader(toys.dataset(), batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    moments = [tensor for state in trainer.optimizers[0].state.values() for tensor in state.values()]
    return {
        "step": trainer.global_step,
        "adapter": {name: tensor.tolist() for name, tensor in adapter_state_dict(model).items()},
        "moments": [tensor.tolist() for tensor in moments],
        "next numbers": [torch.rand(()).item(), random.random(), np.random.rand()],
    }


def train_each(*settings: dict[str, Any]) -> dict[str, Any]:
    """One run after the other in the same processes, which take longer to start than to train."""
    return {"runs": [train(**setting) for setting in settings]}


def spawned(directory: str, strategy: str, settings: dict[str, Any], injected: bool) -> dict[str, Any]:
    """Train over a strategy that starts processes itself; look at the model that this process has then."""
    leave_torchrun()
    model, base = Toy(dropout=0.0), snapshot(Toy())
    lora = LoRA(r=2, summary=False, **settings)
    if injected:
        inject(model, lora.config)
    keep = ModelCheckpoint(directory, save_last=True)
    trainer = toys.trainer(directory, [lora, keep], devices=2, strategy=strategy)
    trainer.fit(model, toys.loader(batch_size=4))
    saved = torch.load(Path(directory, "last.ckpt"), weights_only=True)["state_dict"]
    tested = trainer.test(model, toys.loader(), ckpt_path="best", verbose=False)
    adapted = outputs(model)
    merged = outputs(merge(model))
    state = unmerge(model).state_dict()
    return {
        "trained": any(tensor.any().item() for name, tensor in saved.items() if name.endswith("lora_B")),
        "adapter came back": all(torch.equal(state[name], tensor) for name, tensor in saved.items()),
        "base as before": all(torch.equal(state[name], tensor) for name, tensor in base.items()),
        "merged as adapted": torch.allclose(merged, adapted, rtol=1e-5, atol=1e-6),
        "losses": [tested[0]["test_loss"], trainer.test(model, toys.loader(), verbose=False)[0]["test_loss"]],
    }


def launched(directory: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train in two processes of which this one, the first, is to start the second; save what each is left with."""
    leave_torchrun()
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # ranks that agree do so by the seed of the adapter alone
    model = Toy(dropout=0.0)
    callbacks = [LoRA(**settings), ModelCheckpoint(directory, save_last=True)]
    trainer = toys.trainer(directory, callbacks, devices=2, strategy="ddp")
    trainer.fit(model, toys.loader(batch_size=4))
    torch.save(model.state_dict(), Path(directory, f"merged-{trainer.global_rank}.pt"))
    trainer.strategy.barrier()  # when the first process ends, what it has started is killed
    return {}


class Synced(Toy):
    """Its step calls for all processes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss, sync_dist=True)
        assert self.all_gather(loss.detach()).shape == (2,)
        return loss


class Peek(L.Callback):
    """Saves the tensors with which training starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.save(snapshot(pl_module), Path(trainer.default_root_dir, f"start-{trainer.global_rank}.pt"))


def eva(directory: str) -> dict[str, Any]:
    torch.manual_seed(rank())  # the order of the rows differs between ranks
    lora = LoRA(r=2, init_lora_weights="eva", merge=None, summary=False)
    trainer = toys.trainer(directory, [lora, Peek()], devices=2, strategy="ddp", max_epochs=1)
    model = Synced(dropout=0.0)
    trainer.fit(model, toys.loader(shuffle=True, batch_size=4))
    torch.save(model.state_dict(), Path(directory, f"end-{rank()}.pt"))
    return {}


def diverging(directory: str, strategy: str) -> dict[str, Any]:
    """Train while the second process alone meets a NaN: in its loss alone, or in its gradients too."""
    from helpers.distributed import llama

    class Diverging(llama.Llama):
        def __init__(self, with_gradients: bool) -> None:
            super().__init__()
            self.with_gradients = with_gradients

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if rank() == 0 or batch_idx != 1:
                return loss
            return loss * float("nan") if self.with_gradients else loss + float("nan")

    def fit(with_gradients: bool, **settings: Any) -> Any:
        model = Diverging(with_gradients)
        lora = LoRA(r=2, summary=False, merge=None, **settings)
        trainer = llama.trainer(Path(directory), strategy, [lora], max_steps=3, enable_checkpointing=False)
        trainer.fit(model, llama.loader(strategy))
        return model

    told = {}
    for name, with_gradients in (("alone", False), ("both", True)):
        try:
            fit(with_gradients)
        except RuntimeError as error:
            told[name] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = adapter_state_dict(fit(True, on_nan="warn"))
    warned = sum("Steps left out so far: 1" in str(each.message) for each in caught)
    finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
    return {**told, "warned": warned if rank() == 0 else 1, "finite": finite}


def monitored(directory: str, strategy: str) -> dict[str, Any]:
    """Train with an ``AdapterMonitor`` and return what it logged last."""
    from lightning.pytorch.loggers import CSVLogger

    from helpers.distributed import llama
    from lightning_lora.callbacks import AdapterMonitor

    class Kept(CSVLogger):
        figures: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.figures = {name: value for name, value in metrics.items() if name.startswith("adapter/")}

    logger = Kept(directory)
    callbacks = [LoRA(r=2, summary=False, merge=None), AdapterMonitor(1)]
    trainer = llama.trainer(
        Path(directory),
        strategy,
        callbacks,
        max_steps=4,
        logger=logger,
        log_every_n_steps=100,
        enable_checkpointing=False,
    )
    trainer.fit(llama.Llama(), llama.loader(strategy))
    return {"figures": logger.figures}


def limited(directory: str, strategy: str) -> dict[str, Any]:
    """Train with a ``MaxUpdateNorm`` and return the norms of the adapters' updates."""
    from helpers.distributed import llama
    from lightning_lora.callbacks import MaxUpdateNorm

    callbacks = [LoRA(r=2, lora_alpha=2, summary=False, merge=None), MaxUpdateNorm(1e-3)]
    trainer = llama.trainer(Path(directory), strategy, callbacks, max_steps=4, enable_checkpointing=False)
    model = llama.Llama()
    trainer.fit(model, llama.loader(strategy))
    state = adapter_state_dict(model)
    pairs = {name: state[name.replace("lora_A", "lora_B")] for name in state if name.endswith("lora_A")}
    return {"norms": {name: float((B.double() @ state[name].double()).norm()) for name, B in pairs.items()}}


def base_moved(directory: str, strategy: str, moves: bool) -> dict[str, Any]:
    """Train while one process writes into its shard of the base, and return what it wrote to and what was said."""
    from helpers.distributed import llama
    from lightning_lora.sharding import local_tensor, named_tensors

    wrote: list[str] = []

    class Write(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if moves and not wrote and rank() == world_size() - 1:
                for name, module, inner in named_tensors(pl_module):
                    here = local_tensor(module, inner)
                    if "layers.1.mlp" in name and "lora" not in name and here.numel():
                        here.data.flatten()[-1] += 1
                        wrote.append(name)
                        break

    callbacks = [LoRA(r=2, summary=False, export_dir=directory), Write()]
    trainer = llama.trainer(Path(directory), strategy, callbacks, max_steps=4, enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(llama.Llama(), llama.loader(strategy))
    said = [str(each.message) for each in caught if "frozen base has changed" in str(each.message)]
    return {"wrote": wrote, "said": said, "exported": (Path(directory) / "adapter").exists()}
