"""Layers that are copies of others, as those of a momentum teacher are of its student's: their adapters start alike."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.layers import Target
from lightning_lora.model.fingerprint import spread


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
        weights = _weights_of(target)
        samples = [tuple(spread(weight).tolist()) for weight in weights if _has_values(weight)]
        # Those that are the same everywhere, as zeros are, say nothing.
        if name not in adapters or not samples or len(samples) < len(weights) or any(len(set(s)) < 2 for s in samples):
            continue
        shapes = [*weights, *adapters[name].state_dict().values()]
        # By these keys few weights are left to be compared as a whole.
        key = (type(adapters[name]), *((each.shape, each.dtype) for each in shapes), *samples)
        other = first.setdefault(key, name)
        if other != name and all(map(torch.equal, weights, _weights_of(targets[other]))):
            adapters[name].load_state_dict(adapters[other].state_dict())


def _weights_of(target: Target) -> list[Tensor]:
    return [target.module.get_parameter(parameter).detach() for parameter in target.parameters]


def _has_values(weight: Tensor) -> bool:
    return type(weight) is Tensor and not weight.is_meta and weight.is_floating_point()
