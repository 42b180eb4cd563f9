"""Cross-entropy behind a large output head, with a few rows of logits in memory at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# Logits of a chunk. On a CPU, a chunk of this size was as fast as all rows at once; a GPU wants larger products.
_CPU_CHUNK, _GPU_CHUNK = 2**23, 2**26
Logits = Callable[[Tensor], Tensor]


def token_losses(head: nn.Module, hidden: Tensor, labels: Tensor, transform: Logits, label_smoothing: float) -> Tensor:
    """The loss of each row, without the rows' logits ever being in memory together.

    ``torch.nn.functional.linear_cross_entropy`` of torch 2.13 took four times as long on a CPU, and it takes a weight.
    This calls the module, with what an adapter, a hook or quantized weights do in it.

    Args:
        head: The output head, which works on each row by itself.
        hidden: Its input, of shape ``(rows, width)``.
        labels: Of shape ``(rows,)``.
        transform: What makes the model's logits of the head's output.
        label_smoothing: Share of each label that is spread over all.

    Returns:
        Of shape ``(rows,)``, in float32 or better.
    """

    def logits(rows: Tensor) -> Tensor:
        return transform(head(rows))

    if _is_sharded(head):  # whose hooks count its calls
        return _losses(logits(hidden), labels, label_smoothing)
    size = _rows(hidden, head)
    if torch.is_grad_enabled() and hidden.requires_grad and not _is_trained(head):
        losses: Tensor = _FrozenHead.apply(hidden, labels, size, logits, label_smoothing)  # type: ignore[no-untyped-call]
        return losses

    def losses_of(rows: Tensor, of_rows: Tensor) -> Tensor:
        return _losses(logits(rows), of_rows, label_smoothing)

    # A trained head's gradient is a sum over rows, of which each may count differently: its logits are made again.
    run = partial(checkpoint, losses_of, use_reentrant=False) if _is_trained(head) else losses_of
    return torch.cat([run(*chunk) for chunk in _chunks(hidden, labels, size)])


class _FrozenHead(torch.autograd.Function):
    """A row's gradient is known but for a factor when its logits are there, so that they need not be made again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, size: int, logits: Logits, label_smoothing: float) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for chunk, of_rows in _chunks(hidden, labels, size):
            rows = chunk.detach().requires_grad_()
            with torch.enable_grad():
                output = logits(rows)
            loss, gradient = _losses_and_gradients(output.detach(), of_rows, label_smoothing)
            losses.append(loss)
            gradients += torch.autograd.grad(output, rows, gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * of_losses[:, None]).to(gradients.dtype), None, None, None, None


def _chunks(hidden: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, size), torch.split(labels, size))


def _losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    logits = logits.to(_at_least_float32(logits.dtype))
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def _losses_and_gradients(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The losses, and what they would pass back to the logits: softmax less the smoothed label."""
    dtype, logits = logits.dtype, logits.to(_at_least_float32(logits.dtype))
    labels = labels[:, None]
    log_sum = logits.logsumexp(1, keepdim=True)
    losses = log_sum - (1 - label_smoothing) * logits.gather(1, labels)
    gradients = (logits - log_sum).exp_()
    gradients.scatter_add_(1, labels, gradients.new_full(labels.shape, label_smoothing - 1))
    if label_smoothing:
        losses -= label_smoothing * logits.mean(1, keepdim=True)
        gradients -= label_smoothing / logits.shape[1]
    return losses[:, 0], gradients.to(dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(hidden: Tensor, head: nn.Module) -> int:
    """How many rows a chunk has."""
    width = getattr(head, "out_features", None) or 2**16
    return max(1, (_CPU_CHUNK if hidden.device.type == "cpu" else _GPU_CHUNK) // int(width))


def _is_trained(head: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())


def _is_sharded(head: nn.Module) -> bool:
    return isinstance(head, (FSDPModule, FullyShardedDataParallel)) or any(
        isinstance(parameter, DTensor) for parameter in head.parameters()
    )
