"""Gradients must reach the adapters, also through activation checkpointing over a frozen embedding."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.model.record import injections
from lightning_lora.model.targets import pretrained_models
from lightning_lora.sharding import is_sharded

_ENABLED_HERE = "_lora_inputs_require_grad"


def enable_through_checkpointing(model: nn.Module) -> None:
    """Let transformers models that checkpoint activations pass gradients.

    Reentrant checkpointing computes no gradient for a block unless one of its inputs requires it, and with a frozen
    embedding none does.
    """
    for hf_model in pretrained_models(model).values():
        # Transformers 5 does so by itself, and a second hook would be left behind.
        already = getattr(hf_model, "_require_grads_hook", None) is not None
        if _checkpoints_activations(hf_model) and not already:
            hf_model.enable_input_require_grads()  # type: ignore[operator]
            hf_model.__dict__[_ENABLED_HERE] = True


def _checkpoints_activations(hf_model: nn.Module) -> bool:
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


def require_some(model: nn.Module) -> None:
    """Require that a backward pass has reached at least one adapter, and warn of those that it has not reached.

    Raises:
        RuntimeError: If it reached none.
    """
    layers = {name: layer for injection in injections(model) for name, layer in injection.layers()}
    reached = [any(p.grad is not None for p in layer.lora.parameters()) for layer in layers.values()]
    if is_sharded(model):
        reached = _anywhere(reached)
    missed = [name for name, has_gradient in zip(layers, reached) if not has_gradient]
    if layers and len(missed) == len(layers):
        raise RuntimeError(
            f"The first backward pass gave none of the {len(layers)} adapted layers a gradient, so nothing would be "
            f"trained. Either the loss does not depend on them (the first is {next(iter(layers))!r}), or they lie in "
            "blocks under reentrant activation checkpointing whose inputs require no gradient: use "
            "torch.utils.checkpoint with use_reentrant=False, or make the inputs require gradients."
        )
    if missed:
        rank_zero_warn(
            f"The first backward pass gave {len(missed)} of {len(layers)} adapted layers no gradient, among them "
            f"{missed[0]!r}. They stay untrained if they are not used, or lie in blocks under reentrant activation "
            "checkpointing whose inputs require no gradient (then pass use_reentrant=False)."
        )
