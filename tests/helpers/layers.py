"""Layers of every kind that an adapter can be put on, and what their adapters are."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def make(kind: str, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    if kind == "conv1d":
        layer: nn.Module = Conv1D(out_features, in_features)
        nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    else:
        layer = nn.Linear(in_features, out_features, bias=kind == "linear")
    return layer.to(dtype)


_DRAW = torch.Generator().manual_seed(0)
# A layer and an input.
KINDS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 6, generator=_DRAW)),
    "conv1d": (lambda: make("conv1d", 6, 5), torch.randn(3, 6, generator=_DRAW)),
    "embedding": (lambda: nn.Embedding(6, 5), torch.arange(6)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6, generator=_DRAW)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8, generator=_DRAW)),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    layer = model[0]  # type: ignore[index]
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def adapters(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def move(model: nn.Module) -> None:
    torch.manual_seed(1)
    for adapter in adapters(model):
        nn.init.normal_(adapter.lora_B, std=0.1)
