"""Jobs that count what each process holds and sends, for ``processes.py``."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers.distributed.llama import STRATEGIES, CpuFSDP, Llama, loader, trainer
from lightning_lora import LoRA

KINDS = {
    "allreduce": "reduced",
    "reduce_scatter_base": "reduced",
    "allgather": "gathered",
    "allgather_base": "gathered",
    "broadcast": "gathered",  # FSDP: from each of the processes, what it has
    "wrap_tensor_autograd": "gathered",  # DTensor: what came of it
}


class InBFloat16(CpuFSDP):
    """As ``FSDPStrategy`` is with ``Trainer(precision="bf16-mixed")``."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        self.kwargs["mixed_precision"] = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
        return super()._setup_model(model)


STRATEGIES["fsdp in bfloat16"] = lambda: InBFloat16(auto_wrap_policy={LlamaDecoderLayer})


class Counting(TorchDispatchMode):
    """Notes how many bytes the tensors have that collectives make whole or reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = {"reduced": [], "gathered": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name.strip("_") in KINDS:
            # Beside a whole tensor, there are its parts. Counters, paths and the like are no floating-point numbers.
            self.sizes[KINDS[name.strip("_")]].append(max(map(_bytes, args)))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    """Bytes of floating-point tensors, however deep in lists."""
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    value = value.to_local() if isinstance(value, DTensor) else value
    is_counted = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
    return value.numel() * value.element_size() if is_counted else 0


class Watch(L.Callback):
    """Counts in the second step alone, when everything is set up."""

    def __init__(self) -> None:
        self.counting = Counting()
        self.gradients = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.counting.__enter__()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = _bytes([parameter.grad for parameter in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.counting.__exit__(None, None, None)


class Silent(Llama):
    """Reduces no losses."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)


def count(directory: str, strategy: str, r: int) -> dict[str, Any]:
    """Bytes of two steps and a checkpoint; ``r=0`` is full fine-tuning."""
    path = Path(directory, f"{strategy} {r}.ckpt")
    watch = Watch()
    callbacks = [*([LoRA(r=r, summary=False, merge=None)] if r else []), watch]
    run = trainer(path.parent, strategy, callbacks, max_steps=2, max_epochs=-1, enable_checkpointing=False)
    module = Silent()
    run.fit(module, loader(strategy))
    with Counting() as saving:
        if r:  # torch 2.13 gathers no whole model under FSDP on the CPU
            run.save_checkpoint(path)
    moments = [value for state in run.optimizers[0].state.values() for value in state.values()]
    sizes = watch.counting.sizes
    return {
        "parameters": _bytes(list(module.parameters())),
        "gradients": watch.gradients,
        "moments": _bytes(moments),
        "reduced": sum(sizes["reduced"]),
        "gathered": sum(sizes["gathered"]),
        "largest": max(sizes["gathered"], default=0),
        "gathered for checkpoint": sum(saving.sizes["gathered"]),
    }


def count_each(directory: str, runs: list[list[Any]]) -> dict[str, Any]:
    return {f"{strategy} {r}": count(directory, strategy, r) for strategy, r in runs}
