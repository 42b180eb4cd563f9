"""Strategies that shard the model over processes: adapters alone are gathered, in every path that saves and loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor

from lightning_lora.class_names import is_a
from lightning_lora.fqn import clean_fqn
from lightning_lora.model.eva import KIND
from lightning_lora.model.record import injections
from lightning_lora.model.removed import restored
from lightning_lora.model.state_dict import gathered, saved_names, scatter
from lightning_lora.sharding import named_tensors, register_sharding
from lightning_lora.trainer.fsdp_wrap_policy import AdapterWrapPolicy
from lightning_lora.trainer.optimizer_state import gathered_optimizer, shard_optimizer
from lightning_lora.trainer.strategy import AdapterCheckpoints
from lightning_lora.trainer.weight_averaging import averages

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy")
_WRAPPED = "_lora_wrapped"
_UNSUPPORTED = ("DeepSpeedStrategy", "XLAFSDPStrategy")


def checkpoints_of(strategy: Any) -> type[AdapterCheckpoints]:
    """What a strategy must do differently, by whether every process holds the whole model under it.

    Raises:
        ValueError: If it is one that is not supported.
    """
    # By name, so that the strategies of the package pytorch_lightning count too.
    unsupported = [name for name in _UNSUPPORTED if is_a(strategy, name)]
    if unsupported:
        raise ValueError(
            f"LoRA does not support {unsupported[0]}, which keeps parameters and optimizer state in a format of its "
            'own: use one device, or strategy="ddp", FSDPStrategy or ModelParallelStrategy. With adapters, optimizer '
            "state is small, so the model often fits without sharding."
        )
    return ShardedCheckpoints if any(is_a(strategy, name) for name in _SHARDING) else AdapterCheckpoints


def keeps_whole_model(strategy: Any) -> bool:
    """Whether every process has the whole model under a strategy."""
    return checkpoints_of(strategy) is AdapterCheckpoints


class ShardedCheckpoints(AdapterCheckpoints):
    """What a strategy does differently where processes share the parameters.

    Files hold whole tensors, so that they can be read under any strategy and number of processes.
    """

    model: nn.Module
    optimizers: list[Any]
    kwargs: dict[str, Any]

    @classmethod
    def require_compatible(cls, trainer: Any, lora: Any) -> None:
        averaging = [type(callback).__name__ for callback in trainer.callbacks if averages(callback)]
        if averaging:
            raise ValueError(
                f"{averaging[0]} keeps a second copy of the whole model, which no process has under this strategy: "
                'leave it out, or use strategy="ddp".'
            )
        if lora.config.init_lora_weights == KIND and lora.adapter is None:
            raise ValueError(
                f"init_lora_weights={KIND!r} looks at batches through the whole model, which no process has under this "
                "strategy: compute the start on one device (inject, initialize_eva, save_adapter), and give it by "
                "LoRA(adapter=...)."
            )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # by load_optimizer_state_dict, once the model is loaded

    def setup(self, trainer: Any) -> None:
        if hasattr(self, "sharding_strategy") and not any(isinstance(m, FSDP) for m in self.model.modules()):
            policy = self.kwargs.get("auto_wrap_policy")
            if not isinstance(policy, AdapterWrapPolicy) and (policy is None or callable(policy)):
                self.kwargs["auto_wrap_policy"] = AdapterWrapPolicy(policy)
        # Lightning wraps a module once, and in a later run would leave out what is around all of it.
        self.model = vars(self.lightning_module).get(_WRAPPED, self.model)
        super().setup(trainer)  # type: ignore[misc]
        if isinstance(self.model, FSDP):
            vars(self.lightning_module)[_WRAPPED] = self.model
        if trainer.state.fn != "fit":  # else it is taken in between
            self._take_note()

    def setup_optimizers(self, trainer: Any) -> None:
        self._take_note()  # sharded by now, and configure_optimizers may ask for shapes
        super().setup_optimizers(trainer)  # type: ignore[misc]

    def _take_note(self) -> None:
        register_sharding(self.model)
        for injection in injections(self.model):
            injection.shard_aside()
        mesh = self.lightning_module.device_mesh
        if mesh is not None and mesh["data_parallel"].size() > 1:
            _require_averaged(self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        with restored(module):
            names = set(saved_names(module, [name for name, _, _ in named_tensors(module)]))
            return {name: tensor.cpu() for name, tensor in gathered(module, names).items()}

    def small(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict  # it was made of adapters alone

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        names = saved_names(self.lightning_module, checkpoint["state_dict"])
        scatter(self.lightning_module, {name: checkpoint["state_dict"][name] for name in names})

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return gathered_optimizer(self.model, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state_dict in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(shard_optimizer(self.model, optimizer, state_dict))

    def read_file(self, path: str | Path, weights_only: Any = None) -> dict[str, Any]:
        # Lightning's own would load it into the model at once, base and all.
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)  # type: ignore[attr-defined,no-any-return]

    def copies_in(self, checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
        return iter(())  # as is each


def _require_averaged(module: nn.Module) -> None:
    """Require that every trained parameter is under ``fully_shard``, which alone averages gradients over processes."""
    alone = [clean_fqn(name) for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if alone:
        raise ValueError(
            f"{alone[0]}{f' and {len(alone) - 1} more' if len(alone) > 1 else ''} would be trained outside of what "
            "configure_model gives to fully_shard, so that each process would go its own way: call fully_shard on the "
            "whole model last, or leave these layers out by exclude_modules."
        )
