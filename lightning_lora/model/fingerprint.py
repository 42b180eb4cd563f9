"""Which base an adapter belongs to: a short number of its frozen tensors."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_lora.fqn import clean_fqn
from lightning_lora.layers import LoraLayer
from lightning_lora.layers.offloading import offloaded
from lightning_lora.model.record import Injection, injections_of
from lightning_lora.sharding import full_tensor, named_tensors

_SAMPLES = 16


def fingerprint(injection: Injection) -> str:
    """A short number for the frozen base under an injection, computed once.

    It covers the name and shape of every frozen parameter and persistent buffer, and 16 values spread evenly over
    each, rounded to bfloat16: so a base is told from another at no cost to speak of, and stays the same base when a
    Trainer casts it to bfloat16.
    """
    if injection.fingerprint is None:
        if any(tensor.is_meta for tensor in injection.root.parameters()):
            return "unknown until the model is materialized"
        injection.fingerprint = fingerprint_of(base_tensors(injection))
    return injection.fingerprint


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of named tensors, of which only one is held at a time; see :func:`fingerprint`."""
    digest = hashlib.sha256()
    samples = []
    for name, shape, values in sorted((name, tuple(t.shape), _samples(t)) for name, t in tensors):
        digest.update(f"{name}{shape}".encode())
        samples.append(values)
    for values in samples:
        digest.update(values)
    return digest.hexdigest()[:16]


def _samples(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    if flat.is_meta or not flat.numel():
        return b""
    where = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[where.long().to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def base_tensors(injection: Injection) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters and persistent buffers under an injection, as they are when nothing is merged.

    Where processes share them, each is made full as it comes.
    """
    root = injection.root
    layers = [(clean_fqn(name), module) for name, module in root.named_modules() if isinstance(module, LoraLayer)]
    of_base = {f"{name}.{inner}".lstrip("."): base for name, layer in layers for inner, base in layer._aside.items()}
    beside = injections_of(root)
    for each in beside if injection in beside else (*beside, injection):
        if each.in_place:
            of_base.update(each.aside)
    # What this injection trains is none of its base; what another one trains is.
    trained = {id(injection.tensor(name)) for name in injection.trained}
    trained |= {id(parameter) for _, layer in layers for parameter in layer.lora.parameters()}
    for name, module, inner in named_tensors(root):
        is_buffer = inner in module._buffers
        if id(getattr(module, inner)) not in trained and not (is_buffer and injection.saves(name)):
            yield name, full_tensor(module, inner, of_base.get(name, offloaded(module, inner)))
