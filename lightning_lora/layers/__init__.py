"""The layers that can be adapted, one file a kind."""

from torch import nn

from lightning_lora.layers.attention import LoraMultiheadAttention
from lightning_lora.layers.base import Adapter, LoraAdapter, LoraLayer, Target, adapted_class, class_without_adapter
from lightning_lora.layers.conv import CONVOLUTIONS, LoraConv
from lightning_lora.layers.embedding import LoraEmbedding
from lightning_lora.layers.linear import LoraConv1D, LoraLinear
from lightning_lora.layers.parameters import LoraParameters
from lightning_lora.layers.tokens import LoraTokens, TokenAdapter
from lightning_lora.layers.vera import VeraAdapter, share_projections

__all__ = [
    "SUPPORTED",
    "Adapter",
    "LoraAdapter",
    "LoraLayer",
    "LoraParameters",
    "LoraTokens",
    "Target",
    "TokenAdapter",
    "VeraAdapter",
    "adapted_class",
    "class_without_adapter",
    "layer_class_for",
    "share_projections",
]

SUPPORTED = (
    "torch.nn.Linear, Embedding, Conv1d, Conv2d, Conv3d and MultiheadAttention, transformers.pytorch_utils.Conv1D"
)


def layer_class_for(module: nn.Module) -> type[LoraLayer] | None:
    """The class that adapts this module, ``None`` if its kind is not supported.

    Transformers' ``Conv1D`` is recognized by name, so that transformers need not be imported.
    """
    if isinstance(module, nn.Linear):
        return LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, CONVOLUTIONS):
        return LoraConv
    if isinstance(module, nn.MultiheadAttention):
        return LoraMultiheadAttention
    if any(
        f"{cls.__module__}.{cls.__qualname__}" == "transformers.pytorch_utils.Conv1D" for cls in type(module).__mro__
    ):
        return LoraConv1D
    return None
