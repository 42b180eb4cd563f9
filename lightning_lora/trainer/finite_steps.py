"""NaN and infinity are noticed before an optimizer steps, so that none comes into an adapter."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lora.fqn import clean_fqn, listed
from lightning_lora.model.finite import not_finite, total_norm
from lightning_lora.trainer.frozen_parameters import held_by, nested, step_hooks

ON_NAN = ("raise", "warn", "ignore")
# A scaler starts at 2**16 and halves it at each step that it skips: below this, it is no longer looking for its scale.
_LEAST_SCALE = 2.0**-8


class _Found(NamedTuple):
    """What is not finite: whether the loss is, and the names of parameters, and of those with such gradients."""

    loss: bool
    parameters: list[str]
    gradients: list[str]


class FiniteSteps:
    """Looks at loss and gradients before each step of each optimizer, and waits for the device once.

    Under a gradient scaler a step that is left out is the scaler's normal work, so that nothing is looked at until its
    scale has become too small for that.

    Args:
        trainer: The Trainer, with its optimizers.
        on_nan: ``"raise"`` ends the run, ``"warn"`` leaves the step out.
    """

    def __init__(self, trainer: pl.Trainer, on_nan: str) -> None:
        self._trainer = trainer
        self._leaves_out = on_nan == "warn"
        self._left_out = 0
        self._loss: Tensor | None = None
        self._looked = False
        self._hooks = [hook for each in trainer.optimizers for hook in step_hooks(each, before=self._before_step)]

    def before_backward(self, loss: Tensor) -> None:
        """Remember a loss until the next step."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Look at what the optimizer is about to take, as Lightning tells: before gradients are clipped.

        Raises:
            RuntimeError: In all processes, if it is not finite in one of them.
        """
        self._looked = True
        self._look(optimizer)

    def finish(self) -> None:
        """Look at what the last step of a run has made.

        Raises:
            RuntimeError: In all processes, if it is not finite in one of them.
        """
        held = {id(p): p for optimizer in self._trainer.optimizers for p in _held(optimizer)}.values()
        if self._anywhere(held):
            raise RuntimeError(self._message("The optimizer", self._found(held, None)))

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As torch tells, for steps that do not go through Lightning."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._look_if_new(optimizer)
            return None

        def watched() -> Any:
            loss = closure()
            self._look_if_new(optimizer)
            return loss

        return (args[:1], {**kwargs, "closure": watched})

    def _look_if_new(self, optimizer: Any) -> None:
        if not self._looked:
            self._look(optimizer)
        self._looked = False

    def _look(self, optimizer: Any) -> None:
        loss, self._loss = self._loss, None
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() >= _LEAST_SCALE:
            return
        held = [parameter for parameter in _held(optimizer) if parameter.grad is not None]
        seen = [parameter.grad for parameter in held if parameter.grad is not None]
        seen += [] if loss is None or scaler is not None else [loss]
        if not self._anywhere(seen):
            return
        found = self._found(held, loss)
        message = self._message(type(optimizer).__name__, found)
        if found.parameters or not self._leaves_out:
            raise RuntimeError(message)
        for parameter in held:
            parameter.grad = None
        self._left_out += 1
        if self._left_out & (self._left_out - 1) == 0:  # of many, fewer and fewer are told
            rank_zero_warn(f"{message} Steps left out so far: {self._left_out}.")

    def _anywhere(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of them is not finite in one of the processes, after one wait for the device."""
        tensors = list(tensors)
        return self._is_not_finite(total_norm(tensors)) and self._is_not_finite(total_norm(tensors, torch.inf))

    def _is_not_finite(self, norm: Tensor) -> bool:
        found = ~norm.isfinite().to(self._trainer.strategy.root_device)
        if self._trainer.world_size > 1:
            found = found.float()
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def _found(self, held: Iterable[Tensor], loss: Tensor | None) -> _Found:
        """The same in all processes."""
        ids = set(map(id, held))
        module = self._trainer.lightning_module
        of_layer: dict[str, dict[str, Tensor]] = {}
        for name, parameter in module.named_parameters():
            if id(parameter) in ids:
                of_layer.setdefault(_layer(name), {})[name] = parameter
        found = _Found(
            loss is not None and not bool(loss.isfinite().all()),
            [layer for layer, own in of_layer.items() if not_finite(own)],
            [
                layer
                for layer, own in of_layer.items()
                if not_finite({name: p.grad for name, p in own.items() if p.grad is not None})
            ],
        )
        if self._trainer.world_size == 1:
            return found
        everyone: list[Any] = [None] * self._trainer.world_size
        dist.all_gather_object(everyone, found)
        return _Found(
            any(each.loss for each in everyone),
            list(dict.fromkeys(name for each in everyone for name in each.parameters)),
            list(dict.fromkeys(name for each in everyone for name in each.gradients)),
        )

    def _message(self, optimizer: str, found: _Found) -> str:
        what = ["the loss is"] if found.loss else []
        what += [f"the gradients of {_named(found.gradients)} are"] if found.gradients else []
        what += [f"the adapter itself in {_named(found.parameters)} is"] if found.parameters else []
        strategy: Any = self._trainer.strategy
        path = strategy.last_checkpoint()
        state = (
            "The optimizer's last step made it so."
            if found.parameters
            else f"{optimizer} has not stepped, so what is trained is as it was before."
        )
        fit_loop = self._trainer.fit_loop
        return (
            f"NaN or infinity at step {self._trainer.global_step}, in batch {fit_loop.batch_idx} of "
            f"epoch {self._trainer.current_epoch}: {', and '.join(what)} not finite. {state} "
            + (f"The last checkpoint, {path}, is finite. " if path else "No checkpoint was written before. ")
            + "Look at that batch, lower the learning rate, or clip gradients (gradient_clip_val); "
            'LoRA(on_nan="warn") leaves such steps out, and on_nan="ignore" does not look.'
        )

    def stop(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._loss = None


def _held(optimizer: Any) -> list[Tensor]:
    return list({id(p): p for each in nested(optimizer) for p in held_by(each)}.values())


def _layer(name: str) -> str:
    return clean_fqn(name).partition(".lora.")[0]


def _named(layers: list[str]) -> str:
    return f"{len(layers)} layers ({listed(layers)})" if len(layers) > 1 else repr(layers[0])
