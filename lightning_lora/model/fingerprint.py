"""Which base an adapter belongs to: a short number of its frozen tensors."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.layers import LoraLayer
from lightning_lora.model.record import Injection, adapted_layers, injections_of
from lightning_lora.model.state_dict import is_saved
from lightning_lora.sharding import full_shape, full_tensor, named_tensors, reshard

_SAMPLES = 16


def fingerprint(root: nn.Module, injection: Injection) -> str:
    """A short number for the frozen base under an injection, computed once.

    It covers the name and shape of every frozen parameter and persistent buffer, and 16 values spread evenly over
    each, rounded to bfloat16: so a base is told from another at no cost to speak of, and stays the same base when a
    Trainer casts it to bfloat16.
    """
    if injection.fingerprint is None:
        reshard(root)
        if any(tensor.is_meta for tensor in root.parameters()):
            return "unknown until the model is materialized"
        injection.fingerprint = fingerprint_of(base_tensors(root, injection))
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


def base_tensors(root: nn.Module, injection: Injection) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters and persistent buffers under an injection, as they are when nothing is merged.

    Where processes share them, each is made whole as it comes.
    """
    unmerged: dict[str, Tensor] = {
        f"{name}.{parameter}".lstrip("."): base_weight
        for name, layer in adapted_layers(root, injection)
        for parameter, base_weight in layer._base_weights.items()
    }
    for each in injections_of(root):
        unmerged.update(each.whole)
        unmerged.update({} if each is injection else each.originals)  # what it trains is base to this one
    adapters = {id(p) for m in root.modules() if isinstance(m, LoraLayer) for p in m.lora.parameters()}
    for name, module, inner in named_tensors(root):
        if inner in module._parameters:
            if id(getattr(module, inner)) not in adapters and name not in injection.trained:
                yield name, _whole(module, inner, unmerged.get(name))
        elif not is_saved(name, injection):
            yield name, full_tensor(module, inner)


def _whole(module: nn.Module, name: str, tensor: Tensor | None) -> Tensor:
    """A whole tensor, given what this process holds of it or, as before it was sharded, all."""
    if tensor is not None and tensor.shape == full_shape(module, name) and not isinstance(tensor, DTensor):
        return tensor
    return full_tensor(module, name, tensor)
