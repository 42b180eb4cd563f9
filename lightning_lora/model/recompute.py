"""What activation checkpointing computes again in the backward pass has the adapters of its forward pass.

Lightning calls the backward pass when ``training_step`` is over, and with it a context such as that of
``adapters_for``; and whoever adds up the losses of two adapters has the second one active by then.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_lora.fqn import base_modules
from lightning_lora.layers import LoraLayer
from lightning_lora.model.record import adapted_layers

# Where modules keep the function that checkpoints them: transformers' layers, and torch's CheckpointWrapper.
_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class _WithSameAdapters:
    """A module's function for checkpointing, for passes that have the same adapters both times."""

    def __init__(self, checkpoint: Callable[..., Any], module: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.module = module

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # whose graphs have both passes
            return self.checkpoint(function, *args, **kwargs)
        chosen = [(layer, layer.chosen) for layer in adapted_layers(self.module)]

        def with_same(*args: Any, **kwargs: Any) -> Any:
            with _as_chosen(chosen):
                return function(*args, **kwargs)

        return self.checkpoint(with_same, *args, **kwargs)


@contextmanager
def _as_chosen(chosen: list[tuple[LoraLayer, Any]]) -> Iterator[None]:
    now = [(layer, layer.chosen) for layer, _ in chosen]
    try:
        for layer, choice in chosen:
            layer.chosen = choice
        yield
    finally:
        for layer, choice in now:
            layer.chosen = choice


def keep_adapters(model: nn.Module) -> None:
    """Have all that is checkpointed in a model by now computed again with the adapters of its forward pass."""
    for module, attribute, function in _checkpointing(model):
        if not isinstance(function, _WithSameAdapters):
            setattr(module, attribute, _WithSameAdapters(function, module))


def leave_alone(model: nn.Module) -> None:
    """Undo :func:`keep_adapters`."""
    for module, attribute, function in _checkpointing(model):
        if isinstance(function, _WithSameAdapters):
            setattr(module, attribute, function.checkpoint)


def _checkpointing(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [(m, name, vars(m)[name]) for _, m in base_modules(model) for name in _ATTRIBUTES if name in vars(m)]
