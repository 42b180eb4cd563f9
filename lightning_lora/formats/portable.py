"""An adapter for servers: one rank for all layers and a factor of one in front of ``B A``, in PEFT's format.

Many servers read ``r`` and ``lora_alpha`` alone, or neither, and so compute something else, in silence, where ranks or
scalings differ by layer. Zeros fill up the ranks here, and the scaling is a part of B, so that there is one reading.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.formats.peft_config import config_from_peft
from lightning_lora.formats.peft_files import OF_LAYER

_NOT_HELD = {
    "use_dora": "the magnitudes of DoRA",
    "modules_to_save": "modules that are trained in full (modules_to_save)",
    "trainable_token_indices": "trained rows of an embedding (trainable_token_indices)",
    "target_parameters": "adapters of stacked parameters (target_parameters)",
}
_FACTORS = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}  # their rank's dim


def not_portable(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What the portable layout cannot hold of an adapter, in words; empty if it can hold all.

    Args:
        settings: What ``adapter_config.json`` says.
        tensors: The tensors, under PEFT's names.
    """
    if settings.get("peft_type") != "LORA":
        return [f"an adapter of type {settings.get('peft_type')!r}"]
    found = [what for name, what in _NOT_HELD.items() if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append("trained biases (bias)")
    matches = {name: OF_LAYER.fullmatch(name) for name in tensors}
    odd = [name for name, match in matches.items() if match is None or match["depth"] or match["inner"] not in _FACTORS]
    if odd and not found:
        found.append(f"{odd[0]!r}")
    return found


def as_portable(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give all layers one rank and a scaling of one; the update stays what it is, but for B's rounding.

    Args:
        settings: What ``adapter_config.json`` says.
        tensors: The tensors, under PEFT's names.

    Returns:
        Both, in the portable layout.

    Raises:
        ValueError: Naming what the layout cannot hold.
    """
    problems = not_portable(settings, tensors)
    if problems:
        raise ValueError(
            f"The portable layout cannot hold {', '.join(problems)}: use PEFT's own layout, or write the merged model, "
            "which anything serves."
        )
    config = config_from_peft(settings, "the adapter")
    matches = {name: OF_LAYER.fullmatch(name) for name in tensors}
    found = {name: (match["layer"], match["inner"]) for name, match in matches.items() if match is not None}
    r = max(tensors[name].shape[_FACTORS[inner]] for name, (_, inner) in found.items())
    portable: dict[str, Tensor] = {}
    for name, (layer, inner) in found.items():
        dim, tensor = _FACTORS[inner], tensors[name]
        if dim == 1:
            tensor = tensor * config.scaling(layer)
        shape = list(tensor.shape)
        shape[dim] = r - shape[dim]
        portable[name] = torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()
    one_for_all = {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**settings, **one_for_all}, portable
