"""Outputs and gradients beside PEFT's, with the same adapter on the same device."""

from pathlib import Path

import peft
import pytest
import torch
from helpers import toys
from helpers.models import IDS, tiny_llama

from lightning_lora import LoraConfig, inject, save_adapter

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the norm


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_and_gradients(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = inject(tiny_llama().to(dtype), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    toys.randomize(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path, is_trainable=True).eval()
    ids = IDS.to(device)
    outputs, gradients = [], []
    for model in (ours, theirs):
        out = model.to(device)(ids, labels=ids)
        out.loss.backward()
        outputs.append(out.logits.float())
        gradients.append({_plain(name): p.grad for name, p in model.named_parameters() if p.grad is not None})
    require_close(*outputs, TOLERANCE[dtype], "logits")
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        require_close(gradient.float(), gradients[1][name].float(), TOLERANCE[dtype], name)


def require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert float(expected.norm()) > 0, what
    assert float((found - expected).norm() / expected.norm()) < tolerance, what


def _plain(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".lora.default.lora_", ".lora_")
    return name.replace(".default.weight", "")
