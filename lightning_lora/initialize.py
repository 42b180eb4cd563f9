"""Initial values of an adapter: each tensor drawn from its own generator, seeded by its name."""

import hashlib
import math

import torch
from torch import Tensor, nn


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the tensor's qualified name alone.

    So the initial values are equal on every rank, for any world size, on any device and for any order of injection.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def fill_(tensor: Tensor, kind: str, seed: int, name: str) -> None:
    """Fill an adapter tensor in place; a tensor on the meta device is left for later.

    Args:
        tensor: A matrix whose second dimension is the fan-in.
        kind: ``"kaiming"`` (uniform, as ``nn.Linear`` draws its weight), ``"gaussian"`` (deviation one over the number
            of rows, the rank) or ``"zeros"``.
        seed: See :func:`generator_for`.
        name: The tensor's qualified name.
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
        values.normal_(0.0, 1.0 / values.shape[0], generator=generator)
    else:
        raise ValueError(f"Unknown kind of initialization: {kind!r}.")
    tensor.copy_(values)
