"""Singular values and inner products of products of two narrow matrices, by matrices of the rank's size."""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A of shape (r, in, ...) and B of shape (out, r, ...), whose product is meant


@torch.no_grad()
def singular_values(factors: Factors) -> Tensor:
    """Those of ``B A``, the largest first.

    They are the roots of the eigenvalues of ``(B^T B)(A A^T)``, so that nothing larger than r x r is decomposed.

    Returns:
        Shape ``(r,)``, on the CPU, in float64.
    """
    gram_A, gram_B = _grams(factors, factors)
    values, vectors = torch.linalg.eigh(gram_B)
    root = vectors * values.clamp(min=0).sqrt()
    squares: Tensor = torch.linalg.eigvalsh(root.mT @ gram_A @ root)
    return squares.clamp(min=0).sqrt().flip(0)


@torch.no_grad()
def norm(factors: Factors) -> Tensor:
    """The Frobenius norm of ``B A``, a scalar on the device, for which nothing waits."""
    A, B = (factor.detach().flatten(1) for factor in factors)
    return ((A @ A.mT) * (B.mT @ B)).sum().clamp(min=0).sqrt()


@torch.no_grad()
def inner(one: Factors, two: Factors) -> float:
    """The inner product of two products: the sum of the products of their elements."""
    gram_A, gram_B = _grams(one, two)
    return float((gram_A * gram_B).sum())


@torch.no_grad()
def decomposed(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``B A``, by way of its factors, so that nothing of its size is made.

    Returns:
        The left vectors of shape ``(out, k)``, the values, the largest first, and the right vectors of shape
        ``(k, in)``, in float64 where there is such; ``k`` is the rank, or the smaller side if that is less.
    """
    lora_A, lora_B = (_exact(factor).flatten(1) for factor in factors)
    basis_B, triangle_B = torch.linalg.qr(lora_B)
    basis_A, triangle_A = torch.linalg.qr(lora_A.t())
    left, values, right = torch.linalg.svd(triangle_B @ triangle_A.t(), full_matrices=False)
    return basis_B @ left, values, right @ basis_A.t()


@torch.no_grad()
def subspace_similarity(one: Tensor, other: Tensor) -> Tensor:
    r"""How far the leading directions of two matrices span the same space (Hu et al., 2021, equation 4).

    ``phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j)`` of the first i and j right singular vectors: 1 where the smaller space
    lies in the larger one, 0 where they are orthogonal. It is one minus a squared projection distance of Grassmannians.

    Args:
        one: Shape ``(r, n)``, such as a ``lora_A``.
        other: Shape ``(s, n)``.

    Returns:
        Shape ``(r, s)`` in float64, of which ``[i - 1, j - 1]`` is ``phi(i, j)``.
    """
    first, second = (torch.linalg.svd(m.detach().flatten(1).double(), full_matrices=False).Vh for m in (one, other))
    i, j = (torch.arange(1, len(vectors) + 1, dtype=torch.float64) for vectors in (first, second))
    phi: Tensor = (first @ second.mT).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)
    return phi


def _grams(one: Factors, two: Factors) -> Factors:
    """``A1 A2^T`` and ``B1^T B2``, on the CPU, with one transfer."""
    (A1, B1), (A2, B2) = (tuple(_exact(factor.detach()).flatten(1) for factor in pair) for pair in (one, two))
    gram_A, gram_B = torch.stack([A1 @ A2.mT, B1.mT @ B2]).cpu().double()
    return gram_A, gram_B


def _exact(factor: Tensor) -> Tensor:
    return factor.float() if factor.device.type == "mps" else factor.double()  # which has no float64
