"""Gradients must reach the adapters, also through activation checkpointing over a frozen embedding."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.model.record import injections, named_injections
from lightning_lora.model.targets import pretrained_models
from lightning_lora.sharding import is_sharded
from lightning_lora.trainer.frozen_parameters import held_by, nested

_ENABLED_HERE = "_lora_inputs_require_grad"


def enable_through_checkpointing(model: nn.Module) -> None:
    """Let transformers models that checkpoint activations pass gradients.

    Reentrant checkpointing computes no gradient for a block unless one of its inputs requires it, and with a frozen
    embedding none does.
    """
    for hf_model in pretrained_models(model).values():
        # Transformers 5 does so by itself, and a second hook would be left behind.
        already = getattr(hf_model, "_require_grads_hook", None) is not None
        if checkpoints_activations(hf_model) and not already:
            hf_model.enable_input_require_grads()  # type: ignore[operator]
            hf_model.__dict__[_ENABLED_HERE] = True


def checkpoints_activations(hf_model: nn.Module) -> bool:
    """Whether a model of transformers computes activations again in the backward pass."""
    # Transformers 5 renames the attribute.
    name = "is_activation_checkpointing"
    return bool(getattr(hf_model, name if hasattr(hf_model, name) else "is_gradient_checkpointing", False))


def disable_through_checkpointing(model: nn.Module) -> None:
    """Take the hooks of :func:`enable_through_checkpointing` out again."""
    for hf_model in pretrained_models(model).values():
        if hf_model.__dict__.pop(_ENABLED_HERE, False):
            hf_model.disable_input_require_grads()  # type: ignore[operator]
            hf_model._require_grads_hook = None  # type: ignore[assignment]


def _anywhere(here: list[bool]) -> list[bool]:
    """Whether it is so in any process: one that holds nothing of an adapter has no gradient of it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, here)
    return [any(flags) for flags in zip(*everyone)]


@dataclasses.dataclass
class _Held:
    """What an optimizer holds: of adapted layers by their names, of the rest by where it belongs."""

    layers: dict[str, list[nn.Parameter]]
    in_full: list[nn.Parameter]
    outside: list[nn.Parameter]
    reached: set[str] = dataclasses.field(default_factory=set)
    passes: int = 0
    any_pass: bool = False
    warned: bool = False
    over: bool = False
    hook: Any = None


class GradientWatch:
    """Looks, until the first step of each optimizer that holds adapters, whether gradients reach them.

    An optimizer's own steps are looked at, so that other optimizers may go first. Steps without a gradient are let pass
    while the adapters are frozen, when no backward pass came before, and, with a warning, while gradients reach
    parameters outside of where the adapters were injected: these may be trained alone for a while.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        self._sharded = is_sharded(model)
        self._watched: list[tuple[str, _Held]] = []
        names = {
            id(parameter): f"{root_name}.{name}".lstrip(".")
            for root_name, injection in named_injections(model)
            for name, parameters in injection.parameters()
            for parameter in parameters
        }
        inside = {id(parameter) for injection in injections(model) for parameter in injection.root.parameters()}
        for optimizer in optimizers:
            held = _Held({}, [], [])
            for parameter in {id(p): p for each in nested(optimizer) for p in held_by(each)}.values():
                if id(parameter) in names:
                    held.layers.setdefault(names[id(parameter)], []).append(parameter)  # type: ignore[arg-type]
                else:
                    (held.in_full if id(parameter) in inside else held.outside).append(parameter)  # type: ignore[arg-type]
            if held.layers:
                self._watched.append((type(optimizer).__name__, held))
                held.hook = _after_steps(optimizer, partial(self._judge, type(optimizer).__name__, held))

        if names and not self._watched:
            rank_zero_warn(
                "No optimizer that configure_optimizers gives holds an adapter when fit starts, so they are trained "
                "only if one that you step yourself was made of them since. If they are frozen to wait for other "
                "parts, freeze them in on_train_start."
            )

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to look at."""
        return not self._watched

    def after_backward(self) -> None:
        """Look at the gradients that a backward pass has left."""
        for _, held in self._watched:
            # What happens while the adapters are frozen says nothing about them.
            held.passes += any(p.requires_grad for parameters in held.layers.values() for p in parameters)
            held.any_pass |= held.passes > 0
            if not self._sharded:  # there, all processes look together, at the step
                held.reached |= {name for name, parameters in held.layers.items() if _any_gradient(parameters)}
                held.over |= len(held.reached) == len(held.layers)
        self._forget()

    def finish(self) -> None:
        """Warn at the end of a run if no gradient has ever reached the adapters."""
        for name, held in self._watched:
            if held.any_pass and not held.reached and not self._sharded:
                rank_zero_warn(
                    f"In the whole run, no backward pass gave any of the {len(held.layers)} adapted layers that {name} "
                    f"holds a gradient, so they are as they were: the first is {next(iter(held.layers))!r}."
                )
        self.stop()

    def stop(self) -> None:
        """Look no more."""
        for _, held in self._watched:
            held.over = True
        self._forget()

    def _forget(self) -> None:
        # Not from inside of a hook, where the optimizer goes through them.
        for _, held in self._watched:
            if held.over and held.hook is not None:
                held.hook.remove()
        self._watched = [(name, held) for name, held in self._watched if not held.over]

    def _judge(self, optimizer_name: str, held: _Held, *args: Any) -> None:
        if held.over:
            return
        passes, held.passes = held.passes, 0
        flags = [name in held.reached or _any_gradient(parameters) for name, parameters in held.layers.items()]
        wanted = any(p.requires_grad for parameters in held.layers.values() for p in parameters)
        flags += [_any_gradient(held.in_full), _any_gradient(held.outside), wanted]
        if self._sharded:
            flags = _anywhere(flags)
        *reached, in_full, outside, wanted = flags
        held.reached |= {name for name, is_reached in zip(held.layers, reached) if is_reached}
        if not held.reached and (not wanted or not (passes or in_full or outside)):
            return
        if not held.reached and outside:
            if not held.warned:
                rank_zero_warn(
                    f"{_none_of(optimizer_name, held)} Parameters outside of them are trained alone until then."
                )
            held.warned = True
            return
        held.over = True
        if not held.reached:
            raise RuntimeError(
                f"{_none_of(optimizer_name, held)} If they are to wait for other parts, freeze them for that time with "
                "requires_grad_(False)."
            )
        missed = [name for name in held.layers if name not in held.reached]
        if missed:
            rank_zero_warn(
                f"Up to the first step of {optimizer_name}, backward passes gave {len(missed)} of {len(held.layers)} "
                f"adapted layers no gradient, among them {missed[0]!r}. They stay untrained if they are not used, or "
                "lie in blocks under reentrant activation checkpointing whose inputs require no gradient (then pass "
                "use_reentrant=False)."
            )


def _none_of(optimizer_name: str, held: _Held) -> str:
    return (
        f"Up to this step of {optimizer_name}, backward passes gave none of the {len(held.layers)} adapted layers a "
        "gradient, so they would not be trained. Either the loss does not depend on them (the first is "
        f"{next(iter(held.layers))!r}), or they are run under no_grad, or they lie in blocks under reentrant "
        "activation checkpointing whose inputs require no gradient: use torch.utils.checkpoint with "
        "use_reentrant=False, or make the inputs require gradients."
    )


def _any_gradient(parameters: list[nn.Parameter]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)


def _after_steps(optimizer: Any, look: Callable[..., None]) -> Any:
    """Have an optimizer's steps looked at, or those of the one that it wraps; ``None`` where none of them has hooks."""
    for each in nested(optimizer):
        try:
            return each.register_step_post_hook(look)
        except AttributeError:  # it has not called the constructor of torch's Optimizer
            continue
    return None
