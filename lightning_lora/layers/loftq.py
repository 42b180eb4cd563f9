"""Quantization to 4 and 8 bits, and LoftQ, the low-rank start that makes up for it.

The quantized weight is at once computed back to the weight's own dtype: it is the base that a quantized model would
have, not a smaller one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.config import quantization

BLOCK = 64

# The quantiles of the normal distribution that QLoRA's appendix E lists (Dettmers et al., arXiv 2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(weight: Tensor) -> Tensor:
    """Round to 4-bit NormalFloat (Dettmers et al., "QLoRA", arXiv 2305.14314), without double quantization.

    Each block of 64 values in row-major order is divided by its largest magnitude, and each quotient becomes the
    nearest of 16 values.

    Args:
        weight: Any shape, float32 or float64.

    Returns:
        The values that the codes stand for, with the weight's shape and dtype.
    """
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    code_book = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    borders = (code_book[1:] + code_book[:-1]) / 2
    # A block of zeros has no scale to be divided by, and stays zero.
    codes = torch.bucketize(blocks / scale.where(scale > 0, 1), borders)
    return (code_book[codes] * scale).flatten()[: flat.numel()].view_as(weight)


def int8(weight: Tensor) -> Tensor:
    """Round each row to whole multiples, from -127 to 127, of its largest magnitude over 127.

    Source: the row-wise absmax quantization of Dettmers et al., "LLM.int8()", arXiv 2208.07339.

    Args:
        weight: Shape ``(out_features, in_features)``, float32 or float64.

    Returns:
        The values that the codes stand for, with the weight's shape and dtype.
    """
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale.where(scale > 0, 1)).round() * scale


@torch.no_grad()
def loftq(weight: Tensor, kind: str, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A quantized weight ``Q`` and the ``B`` and ``A`` of rank r for which ``Q + B A`` is near the weight.

    Algorithm 1 of Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659:
    ``Q = quantize(W - B A)`` and ``B A = `` the r largest singular parts of ``W - Q``, in turn, from ``B A = 0`` on.

    Args:
        weight: Shape ``(out_features, in_features)``.
        kind: ``"loftq"`` (4 bits, one iteration), ``"loftq_<4 or 8>"`` or ``"loftq_<4 or 8>_niter_<n>"``.
        r: The rank.

    Returns:
        Q in the weight's dtype; B of shape ``(out_features, r)`` and A of shape ``(r, in_features)``, each with the
        root of the singular values.
    """
    asked = quantization(kind)
    assert asked is not None
    bits, iterations = asked
    whole = weight.to(torch.promote_types(weight.dtype, torch.float32))
    product = torch.zeros_like(whole)
    for _ in range(iterations):
        quantized = _rounded(whole - product, bits).to(weight.dtype)
        left, values, right = torch.linalg.svd(whole - quantized, full_matrices=False)
        root = values[:r].sqrt()
        lora_A, lora_B = root.unsqueeze(1) * right[:r], left[:, :r] * root
        product = lora_B @ lora_A
    return quantized, lora_B, lora_A


def is_rounded(weight: Tensor, bits: int) -> bool:
    """Whether a weight has the values that LoftQ's quantization to 4 or 8 bits gives, so that it leaves it as it is."""
    whole = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    # Packages list the codes to four digits or more.
    return torch.allclose(_rounded(whole, bits), whole, rtol=1e-3, atol=0)


def _rounded(weight: Tensor, bits: int) -> Tensor:
    return (nf4 if bits == 4 else int8)(weight)
