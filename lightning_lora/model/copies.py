"""Layers that are copies of others, as those of a momentum teacher are of its student's: their adapters start alike."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.layers import Target

_SAMPLES = 16


@torch.no_grad()
def start_copies_alike(targets: Mapping[str, Target], adapters: Mapping[str, nn.Module]) -> None:
    """Give the new adapters of copied layers the start of those of the first.

    An average of A and B over training steps then is near the average of their products, as it is of weights.

    Args:
        targets: The layers, by name.
        adapters: The new adapter of each.
    """
    first: dict[tuple[object, ...], str] = {}
    for name, target in targets.items():
        weights = [target.module.get_parameter(parameter) for parameter in target.parameters]
        if name not in adapters or not all(_is_readable(weight) for weight in weights):
            continue
        # The samples tell most apart, so that few are compared as a whole.
        key = (
            type(adapters[name]),
            *(part for weight in weights for part in (weight.shape, weight.dtype, _sample(weight))),
        )
        other = first.setdefault(key, name)
        same = [targets[other].module.get_parameter(parameter) for parameter in targets[other].parameters]
        if other != name and all(map(torch.equal, weights, same)):
            theirs = adapters[other].state_dict()
            if {key: value.shape for key, value in theirs.items()} == {
                key: value.shape for key, value in adapters[name].state_dict().items()
            }:
                adapters[name].load_state_dict(theirs)


def _is_readable(weight: Tensor) -> bool:
    """Whether it has values of its own here, and not the same everywhere, as zeros are."""
    plain = type(weight) is nn.Parameter and not weight.is_meta and weight.is_floating_point()
    return plain and len(set(_sample(weight))) > 1


def _sample(weight: Tensor) -> tuple[float, ...]:
    flat = weight.detach().flatten()
    where = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64).long()
    return tuple(flat[where.to(flat.device)].tolist())
