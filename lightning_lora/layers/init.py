"""Initial values of an adapter: each tensor drawn from its own generator, seeded by its name."""

import hashlib
import math

import torch
from torch import Tensor, nn

from lightning_lora.rng import seeded
from lightning_lora.sharding import copy_full_


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the tensor's qualified name alone.

    So the initial values are equal on every rank, for any world size, on any device and for any order of injection.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def fill_(tensor: Tensor, kind: str, seed: int, name: str, r: int = 1) -> None:
    """Fill an adapter tensor in place; a tensor on the meta device is left for later.

    Args:
        tensor: A matrix whose second dimension is the fan-in, or a convolution's weight.
        kind: ``"kaiming"`` (uniform, as ``nn.Linear`` draws its weight), ``"gaussian"`` (deviation
            ``1 / r``), ``"normal"`` (deviation one) or ``"zeros"``.
        seed: See :func:`generator_for`.
        name: The tensor's qualified name.
        r: The rank.
    """
    if tensor.is_meta:
        return
    if kind == "zeros":
        tensor.zero_()
        return
    values = torch.empty(tensor.shape, dtype=torch.float32)
    generator = generator_for(seed, name)
    if kind == "kaiming":
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    elif kind == "gaussian":
        values.normal_(0.0, 1.0 / r, generator=generator)
    elif kind == "normal":
        values.normal_(generator=generator)
    else:
        raise ValueError(f"Unknown kind of initialization: {kind!r}.")
    copy_full_(tensor, values)


@torch.no_grad()
def orthogonal(shape_A: tuple[int, ...], shape_B: tuple[int, ...], seed: int, name: str) -> tuple[Tensor, Tensor]:
    """A and B whose product is zero, since they use orthogonal halves of an ``r``-dimensional basis.

    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation, as in PEFT.

    Args:
        shape_A: ``(r, in_features)`` with an even r.
        shape_B: ``(out_features, r)``.
        seed: See :func:`generator_for`.
        name: The adapter's qualified name.
    """
    generator = generator_for(seed, name)
    (r, in_features), (out_features, _) = shape_A, shape_B
    basis, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    lora_A = (torch.randn(in_features, r // 2, generator=generator) @ basis[0::2]).t() / 10
    lora_B = torch.randn(out_features, r // 2, generator=generator) @ basis[1::2] / 10
    return lora_A, lora_B


def require_part(weight: Tensor, kind: str, r: int, name: str) -> None:
    """Require a weight that has a part of rank r.

    Raises:
        ValueError: If it is too small, or not loaded yet.
    """
    if r > min(weight.shape) or weight.is_meta:
        raise ValueError(
            f"init_lora_weights={kind!r} starts {name} at a part of rank {r} of its weight, "
            + ("which is on the meta device" if weight.is_meta else f"which has shape {tuple(weight.shape)}")
            + ": load the weights first, and use a rank of at most the smaller dimension (rank_pattern). "
            "Nothing was changed."
        )


@torch.no_grad()
def from_weight(weight: Tensor, kind: str, r: int, scaling: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """A and B such that ``scaling * B A`` is a part of the weight, as PEFT computes them.

    Args:
        weight: Shape ``(out_features, in_features)``.
        kind: ``"pissa"``: the r largest singular values and their vectors (Meng et al., arXiv 2404.02948);
            ``"pissa_niter_<n>"``: the same from a randomized decomposition with n iterations (Halko et al.,
            arXiv 0909.4061); ``"olora"``: the first r columns and rows of the QR decomposition (Büyükakyüz, arXiv
            2406.01775), which PEFT does not divide by the scaling either.
        r: The rank, at most the smaller dimension.
        scaling: The factor in front of ``B A``.
        seed: Seed of the randomized decomposition; see :func:`generator_for`.
        name: The adapter's qualified name.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if kind == "olora":
        basis, triangle = torch.linalg.qr(weight)
        return triangle[:r], basis[:, :r]
    if kind == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        with seeded(generator_for(seed, name).initial_seed(), weight.device):
            left, values, right = torch.svd_lowrank(weight, r, niter=int(kind.removeprefix("pissa_niter_")))
            right = right.t()
    root = (values[:r] / scaling).sqrt()
    return root.unsqueeze(1) * right[:r], left[:, :r] * root
