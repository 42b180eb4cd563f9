"""Checkpoints of adapters that are on a device: pinned, and written by another thread."""

from pathlib import Path

import pytest
import torch
from helpers.runs import fit
from helpers.toys import Toy, assert_adapter_only, assert_same_tensors, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lora import LoRA, adapter_state_dict, load_adapter_state_dict, load_from_checkpoint

pytestmark = pytest.mark.gpu


def run(device: str, path: Path, **kw: object) -> Toy:
    keep = ModelCheckpoint(path, save_last=True)
    model, _ = fit(path, keep, lora=LoRA(r=2, summary=False, merge=None), accelerator=device, **kw)
    return model


def test_an_asynchronous_checkpoint_is_that_of_its_moment(device: str, tmp_path: Path) -> None:
    base = snapshot(Toy())
    model = run(device, tmp_path, plugins=[AsyncCheckpointIO()])
    assert_adapter_only(tmp_path / "last.ckpt", base)
    loaded = load_from_checkpoint(Toy, tmp_path / "last.ckpt")
    assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(model.to("cpu")))


def test_an_adapter_goes_to_pinned_memory_and_back(device: str, tmp_path: Path) -> None:
    model = run(device, tmp_path).to(device)
    trained = {name: tensor.cpu() for name, tensor in adapter_state_dict(model).items()}
    pinned = {name: t.pin_memory() if device == "cuda" else t.clone() for name, t in trained.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.0 if parameter.requires_grad else 1.0)
    load_adapter_state_dict(model, pinned)
    assert all(tensor.device.type == device for tensor in adapter_state_dict(model).values())
    assert_same_tensors({name: tensor.cpu() for name, tensor in adapter_state_dict(model).items()}, trained)
