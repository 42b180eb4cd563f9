"""Take the adapters out of a model."""

from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.layers import MergedForm
from lightning_lora.model.merge import merge_layers
from lightning_lora.model.recompute import leave_alone
from lightning_lora.model.record import adapted_layers, roots_of
from lightning_lora.model.removed import keep_removed, remove_all, require_adapters

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def eject(
    model: ModuleT, merge: bool = False, *, dtype: torch.dtype | None = None, requantize: bool = False
) -> ModuleT:
    """Take the adapters out of a model, in place: class and attributes of every layer are again as they were.

    Args:
        model: The model, or one that contains it.
        merge: Merge the adapters into the weights, and keep the weights trained in full. :func:`unmerge` then restores
            the adapted model, whose base weights are kept in memory until the model is gone. By default, the base
            weights are restored and the adapters dropped.
        dtype: Of the ordinary weights that quantized ones become when an adapter is merged into them; see
            :func:`~lightning_lora.merge`. Their layers are ``nn.Linear`` then.
        requantize: Quantize merged weights again instead.

    Returns:
        The same model.

    Raises:
        ValueError: If a merged weight holds a NaN or an infinity, or if there is no adapter in the model. Nothing is
            changed then.
    """
    found = require_adapters(model, "to take out")
    gone = [name for injection in found for name in injection.gone()]
    if gone:
        rank_zero_warn(
            f"Something else was put in the place of {', '.join(map(repr, gone))} since the adapters were put in. "
            "It is left as it is, without an adapter."
        )
    if merge:
        merge_layers(model, adapted_layers(model), MergedForm(dtype, requantize))
    else:
        for layer in adapted_layers(model):
            layer.unmerge()
        for injection in reversed(found):
            injection.switch(False)
    leave_alone(model)
    for root in roots_of(found):
        removed = remove_all(root)
        if merge:
            keep_removed(root, removed)
    return model
