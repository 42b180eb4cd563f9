"""The LoRA arithmetic, free of modules.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor  # not public, but what torch's documentation has for tensors without values
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode  # of which torch 2.13 has no public name

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)  # not another subclass, which has operations of its own
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # new in PyTorch 2.7


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
    return add_from_rank(out, F.linear(x, lora_A.to(x.dtype)), lora_B, scaling)


def add_from_rank(out: Tensor, low_rank: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The second half of :func:`add_low_rank`: ``out + scaling * low_rank B^T``.

    Args:
        out: The base layer's output, shape ``(*, out_features)``.
        low_rank: The input times ``A^T``, shape ``(*, r)``.
        lora_B: Shape ``(out_features, r)``.
        scaling: The factor in front of ``B A``.

    Returns:
        The sum, with the shape and dtype of ``out``.
    """
    lora_B = lora_B.to(low_rank.dtype)
    if out.dtype != low_rank.dtype or out.is_nested:  # of which no matrix of rows can be made
        return out + (scaling * F.linear(low_rank, lora_B)).to(out.dtype)
    out_features, r = lora_B.shape  # which hold in a trace for any number of dimensions
    rows, low_rank = out.reshape(-1, out_features), low_rank.reshape(-1, r)
    return _in_shape_of(out, torch.addmm(rows, low_rank, lora_B.t(), alpha=scaling))


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
    return _in_shape_of(out, torch.baddbmm(out.reshape(*low_rank.shape[:2], -1), low_rank, B[choice].mT))


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
    # The backward pass is that of real numbers, and the meta device knows no autocast.
    fusible = dtype.is_floating_point and torch.amp.is_autocast_available(device)
    if not (fusible and is_plain(x, weight, bias, lora_A, lora_B)):
        return add_low_rank(F.linear(x, weight, bias), x, lora_A, lora_B, scaling)
    tensors = (x, weight, bias, lora_A, lora_B)
    if torch.overrides.has_torch_function(tensors):  # a mode that looks on at every function looks on at this one too
        return torch.overrides.handle_torch_function(low_rank_linear, tensors, *tensors, scaling)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    cast = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    # Computed with out here, since torch 2.13 cannot compile a number that changes and is first met in the function,
    # where the same layer is called twice.
    out: Tensor = _LowRankLinear.apply(*cast, 1.0 * scaling)[0]  # type: ignore[no-untyped-call]
    return out


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these tensors will see no more than passes forward and backward, compiled or not.

    Nothing else is defined for a ``torch.autograd.Function`` with only a backward pass, nor for all changes in place:
    forward-mode derivatives, the transforms of ``torch.func``, programs that are saved, and subclasses of Tensor need
    PyTorch's own operations. So do dispatch modes that keep what operations give, as selective activation checkpointing
    does: it would add the adapter to what has it already.
    """
    return not (
        _is_exporting()
        or torch.jit.is_tracing()  # type: ignore
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode(include_infra_modes=False)
    ) and all(
        tensor is None or (type(tensor) in PLAIN_TENSORS and forward_ad.unpack_dual(tensor).tangent is None)  # type: ignore
        for tensor in tensors
    )


def _in_shape_of(out: Tensor, total: Tensor) -> Tensor:
    """A tensor of rows, which nothing else refers to, in the shape of the output, and a tensor of its own.

    A view that was made while gradients were off cannot be changed in place once they are on.
    """
    if torch.jit.is_tracing():  # type: ignore  # its trace then holds for any number of dimensions
        return total.view_as(out)
    if total.dim() == out.dim():
        return total
    shaped: Tensor = torch.ops.aten._unsafe_view.default(total, out.shape)
    return shaped


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        low_rank = x.reshape(-1, x.shape[-1]) @ lora_A.t()
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(low_rank, lora_B.t(), alpha=scaling)
        ctx.scaling = scaling
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        # What the plain path would keep. Only the gradient of A needs x, so with A frozen (LoRA-FA) x is not kept.
        ctx.save_for_backward(
            x if needs_A else None,
            weight if needs_x else None,
            lora_A if needs_x else None,
            lora_B if needs_x or needs_A else None,
            low_rank if needs_B else None,
        )
        # F.linear may give a view, and autograd lets no view be changed in place that a function of several outputs
        # has returned. This is the same tensor, as none.
        return out.data, low_rank

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_low_rank: Tensor) -> tuple[Tensor | None, ...]:
        device = grad_out.device.type
        if torch.is_autocast_enabled(device):  # as the forward pass was not, or its casts are done
            with torch.autocast(device, enabled=False):
                return _LowRankLinear.backward(ctx, grad_out, grad_low_rank)
        x, weight, lora_A, lora_B, low_rank = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        grad_x = grad_A = grad_B = None
        # The small products are bound by reading their large factor, so those of one factor come in a row, while it is
        # in the cache. On a CPU, one with few columns of a row-major matrix is two to three times slower than one with
        # few rows or of a column-major matrix.
        if needs_x or needs_A:
            lora_B = lora_B.t().contiguous().t()
            # The rank-wide product has a gradient of its own in second derivatives alone, and is zero in the first.
            grad_low_rank = torch.addmm(grad_low_rank, grad_rows, lora_B, alpha=ctx.scaling)
        if needs_B:
            grad_B = ctx.scaling * (low_rank.t() @ grad_rows).t()
        if needs_A:
            grad_A = grad_low_rank.t() @ x.reshape(-1, x.shape[-1])
        if needs_x:
            grad_x = (grad_rows @ weight).addmm_(grad_low_rank, lora_A)
            grad_x = grad_x.view(*grad_out.shape[:-1], weight.shape[1])
        grad_bias = grad_rows.sum(0) if needs_bias else None
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
