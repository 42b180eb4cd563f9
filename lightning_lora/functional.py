"""The LoRA arithmetic, free of modules.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import torch
from torch import Tensor


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
    low_rank = x.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).t()
    lora_B = lora_B.to(low_rank.dtype).t()
    if out.dtype != low_rank.dtype:
        return out + (scaling * (low_rank @ lora_B)).to(out.dtype).view_as(out)
    return torch.addmm(out.reshape(-1, out.shape[-1]), low_rank, lora_B, alpha=scaling).view_as(out)


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
