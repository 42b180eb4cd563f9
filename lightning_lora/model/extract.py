"""An adapter made of what a full fine-tune has changed in the linear layers of its base."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers import layer_class_for
from lightning_lora.layers.init import generator_for
from lightning_lora.layers.linear import LoraConv1D, LoraLinear
from lightning_lora.model.inject import inject
from lightning_lora.model.record import injections, parameters_by_name
from lightning_lora.model.targets import modules_by_name
from lightning_lora.rng import seeded

_EXACT = 1024  # the smaller side of a weight up to which it is decomposed exactly
_MORE, _ITERATIONS = 16, 8  # of the randomized decomposition: vectors beside those kept, and power iterations


class Extracted(NamedTuple):
    """What was found.

    Attributes:
        errors: By layer, how far its update is from the change of its weight, relative to it, in the Frobenius norm.
        left_out: By name, the relative change of parameters that is not in the adapter.
    """

    errors: dict[str, float]
    left_out: dict[str, float]


@torch.no_grad()
def extract_adapter(base: nn.Module, tuned: nn.Module, r: int) -> Extracted:
    """Put an adapter into a base that makes it, as far as a rank can, what it was fine-tuned to.

    Of every linear layer whose weight has changed, the adapter is the best approximation of the change at this rank
    (Eckart and Young, 1936): exactly for a smaller side of up to 1024, and by a randomized decomposition (Halko et al.,
    arXiv 0909.4061) for larger ones. Weights that are tied to others are left out.

    Args:
        base: The model before, without adapters.
        tuned: The same model after, without adapters.
        r: The rank.

    Raises:
        ValueError: If the models do not have the same parameters, or no linear layer has changed.
    """
    before, after = parameters_by_name(base), parameters_by_name(tuned)
    unlike = [name for name in {**before, **after} if _shape(before.get(name)) != _shape(after.get(name))]
    if unlike:
        raise ValueError(
            f"These are not one model before and after: {unlike[0]!r} is {_shape(before.get(unlike[0]))} in the base "
            f"and {_shape(after.get(unlike[0]))} in the other. Nothing was changed."
        )
    changes = {name: _change(before[name], after[name]) for name in before}
    holders: dict[int, int] = {}
    for module in base.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    layers = [
        name
        for name, module in modules_by_name(base).items()
        if layer_class_for(module) in (LoraLinear, LoraConv1D)
        if changes.get(f"{name}.weight") and holders[id(module.weight)] == 1
    ]
    if not layers:
        raise ValueError("No linear layer of the two models differs, so there is nothing to extract.")
    config = LoraConfig(r=r, lora_alpha=r, target_modules=layers, modules_to_save=None)
    (injection,) = injections(inject(base, config))
    errors = {}
    for name, layer in injection.layers():
        adapter: Any = layer.adapter(injection.adapter_name)
        change = adapter.rows(after[f"{name}.weight"].float() - before[f"{name}.weight"].float())
        left, values, right = _decomposed(change, r, name)
        root = nn.functional.pad(values[:r].sqrt(), (0, max(0, r - len(values))))
        found = min(r, len(values))
        adapter.lora_A.zero_()[:found] = root[:found].unsqueeze(1) * right[:found]
        adapter.lora_B.zero_()[:, :found] = left[:, :found] * root[:found]
        rest = change - adapter.lora_B.float() @ adapter.lora_A.float()
        errors[name] = float(torch.linalg.norm(rest) / torch.linalg.norm(change))
    inside = {f"{name}.weight" for name in layers}
    return Extracted(errors, {name: change for name, change in changes.items() if change and name not in inside})


def _decomposed(change: Tensor, r: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    if min(change.shape) <= _EXACT:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        return left, values, right
    with seeded(generator_for(0, name).initial_seed(), change.device):
        left, values, right = torch.svd_lowrank(change, min(r + _MORE, *change.shape), niter=_ITERATIONS)
    return left, values, right.t()


def _change(before: Tensor, after: Tensor) -> float:
    """Relative to what it was."""
    difference = torch.linalg.vector_norm(after.float() - before.float())
    size = torch.linalg.vector_norm(before.float())
    return float(difference / size if size else difference)


def _shape(parameter: Tensor | None) -> tuple[int, ...] | None:
    return None if parameter is None else tuple(parameter.shape)
