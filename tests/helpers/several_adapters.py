"""A model with two adapters, and what it computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.models import tiny_llama
from lightning_lora import LoraConfig, adapters, add_adapter, inject, set_adapter
from lightning_lora.layers import LoraLayer

IDS = torch.arange(24).view(4, 6)
FR = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
DE = LoraConfig(r=3, target_modules=["v_proj", "up_proj"], lora_alpha=5)


def moved(model: nn.Module) -> nn.Module:
    """Every adapter as if trained, each in its own way."""
    torch.manual_seed(len(adapters(model)))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for parameter in layer.lora.parameters():
                nn.init.normal_(parameter, std=0.2)
    return model


def two(make: Callable[[], nn.Module] = tiny_llama, fr: LoraConfig = FR, de: LoraConfig = DE) -> nn.Module:
    model = add_adapter(inject(make(), fr, "fr"), de, "de").eval()
    return moved(model)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def alone(model: nn.Module, name: str, ids: Tensor = IDS) -> Tensor:
    """What one adapter computes on a base of its own, by way of a file and of PEFT."""
    set_adapter(model, name)
    return logits(model, ids)
