"""The LoRA arithmetic, free of modules.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def add_low_rank(out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Add the low-rank path to a base layer's output: ``out + scaling * (x A^T) B^T``.

    The scaling and the addition ride on the second product, so no further tensor of the output's size is made. The
    adapter is cast to the input's dtype, never the larger input to the adapter's.

    Args:
        out: The base layer's output, shape ``(*, out_features)``.
        x: The base layer's input, shape ``(*, in_features)``.
        lora_A: Shape ``(r, in_features)``.
        lora_B: Shape ``(out_features, r)``.
        scaling: The factor in front of ``B A``.

    Returns:
        The sum, with the shape and dtype of ``out``.
    """
    return add_from_rank(out, x.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).t(), lora_B, scaling)


def add_from_rank(out: Tensor, low_rank: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The second half of :func:`add_low_rank`: ``out + scaling * low_rank B^T``.

    Args:
        out: The base layer's output, shape ``(*, out_features)``.
        low_rank: The input times ``A^T``, shape ``(rows, r)``.
        lora_B: Shape ``(out_features, r)``.
        scaling: The factor in front of ``B A``.

    Returns:
        The sum, with the shape and dtype of ``out``.
    """
    lora_B = lora_B.to(low_rank.dtype).t()
    if out.dtype != low_rank.dtype:
        return out + (scaling * (low_rank @ lora_B)).to(out.dtype).view_as(out)
    return torch.addmm(out.reshape(-1, out.shape[-1]), low_rank, lora_B, alpha=scaling).view_as(out)


def add_low_rank_by_sample(out: Tensor, x: Tensor, factors: list[tuple[Tensor, Tensor]], choice: Tensor) -> Tensor:
    """Add to each sample's output the low-rank path of its own A and B, all in two batched products.

    Args:
        out: The base layer's output, shape ``(samples, *, out_features)``.
        x: The base layer's input, shape ``(samples, *, in_features)``.
        factors: A and scaled B of each adapter, shapes ``(r, in_features)`` and ``(out_features, r)``, of any ranks.
        choice: For each sample, the index of its adapter in ``factors``, or their number for none. It is a tensor, so
            that code compiled for one batch is good for the next.

    Returns:
        The sum, with the shape and dtype of ``out``.
    """
    r = max(len(lora_A) for lora_A, _ in factors)
    # Zeros fill up lower ranks, and are the last pair, for samples without an adapter.
    A = torch.stack([F.pad(lora_A.to(x.dtype), (0, 0, 0, r - len(lora_A))) for lora_A, _ in factors])
    B = torch.stack([F.pad(lora_B.to(x.dtype), (0, r - lora_B.shape[1])) for _, lora_B in factors])
    A, B = (torch.cat([stacked, torch.zeros_like(stacked[:1])]) for stacked in (A, B))
    low_rank = torch.bmm(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), A[choice].mT)
    if out.dtype != low_rank.dtype:
        return out + torch.bmm(low_rank, B[choice].mT).view_as(out).to(out.dtype)
    return torch.baddbmm(out.reshape(*low_rank.shape[:2], -1), low_rank, B[choice].mT).view_as(out)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """A frozen linear layer and its low-rank path in one: ``x W^T + bias + scaling * (x A^T) B^T``.

    The same as :func:`add_low_rank` on the layer's output, but the path is added into that output in place, and so is
    its gradient into the base's, which spares a pass over the activations each way.

    Args:
        x: Shape ``(*, in_features)``.
        weight: Shape ``(out_features, in_features)``, frozen.
        bias: Shape ``(out_features,)``, or ``None``.
        lora_A: Shape ``(r, in_features)``.
        lora_B: Shape ``(out_features, r)``.
        scaling: The factor in front of ``B A``.

    Returns:
        Shape ``(*, out_features)``, in the dtype of ``x`` or, under autocast, in that of autocast. The others are cast.
    """
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    tensors = (None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias, lora_A, lora_B))
    out: Tensor = _LowRankLinear.apply(*tensors, scaling)[0]  # type: ignore[no-untyped-call]
    return out


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        low_rank = x.reshape(-1, x.shape[-1]) @ lora_A.t()
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(low_rank, lora_B.t(), alpha=scaling)
        return out, low_rank

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, lora_A, lora_B, ctx.scaling = inputs
        # Only the gradient of A needs x, so with A frozen (LoRA-FA) x is not kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, lora_A, lora_B, output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_low_rank: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, low_rank = ctx.saved_tensors
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        # The small products are bound by reading their large factor, so those of one factor come in a row, while it is
        # in the cache. On a CPU, one with few columns of a row-major matrix is two to three times slower than one with
        # few rows or of a column-major matrix.
        lora_B = lora_B.t().contiguous().t()
        # The rank-wide product has a gradient of its own in second derivatives alone, and is zero in the first.
        grad_low_rank = torch.addmm(grad_low_rank, grad_rows, lora_B, alpha=ctx.scaling)
        grad_B = ctx.scaling * (low_rank.t() @ grad_rows).t() if ctx.needs_input_grad[4] else None
        grad_A = grad_low_rank.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_low_rank, lora_A)
            grad_x = grad_x.view(*grad_out.shape[:-1], weight.shape[1])
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_A, grad_B, None


def low_rank_product(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The update of the weight, ``scaling * B A``, in float32 or better.

    Args:
        lora_A: Shape ``(r, in_features)``.
        lora_B: Shape ``(out_features, r)``.
        scaling: The factor in front of ``B A``.

    Returns:
        Shape ``(out_features, in_features)``.
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    return scaling * (lora_B.to(dtype) @ lora_A.to(dtype))
