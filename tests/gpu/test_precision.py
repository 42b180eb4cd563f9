"""Autocast and scaled gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.runs import fit
from helpers.toys import Toy, assert_same_tensors, base_of, inputs, loader, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRA, LoraConfig, adapter_state_dict, inject, unmerge

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_a_run_leaves_the_base_bit_for_bit(device: str, precision: str, tmp_path: Path) -> None:
    if precision == "16-mixed" and device == "cpu":
        pytest.skip("Lightning scales gradients of 16-mixed on a GPU only")
    model = Toy(lr=5e-2)
    base = {name: t.bfloat16() if precision == "bf16-true" and t.is_floating_point() else t
            for name, t in snapshot(model).items()}  # fmt: skip
    keep = ModelCheckpoint(tmp_path, save_last=True)
    settings = {"accelerator": device, "precision": precision}
    fit(tmp_path, keep, model=model, **settings)
    unmerge(model)
    assert_same_tensors(base_of(model.to("cpu"), base), base)
    assert any(bool(t.any()) for name, t in adapter_state_dict(model).items() if "lora_B" in name)
    toys.assert_adapter_only(tmp_path / "last.ckpt", base)
    resumed = toys.trainer(tmp_path, LoRA(r=2, summary=False), max_epochs=3, **settings)
    resumed.fit(Toy(lr=5e-2), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 3 * len(loader())


def test_a_step_whose_gradients_overflow_is_left_out(device: str) -> None:
    model = inject(toys.toy_net(dropout=0.0).to(device), LoraConfig(r=2, target_modules=["0", "4"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    x = inputs().to(device)

    def step(scale_of_loss: float) -> dict[str, Any]:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            loss = nn.functional.mse_loss(model(x).float(), x[:, :1]) * scale_of_loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}

    first = step(1.0)
    second = step(1.0)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert_same_tensors(step(float("inf")), second)
    assert scaler.get_scale() == 512.0
    assert not all(torch.equal(second[name], tensor) for name, tensor in step(1.0).items())
