"""Beside ``torch.compile``, of the whole LightningModule and of a part of it."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.toys import (
    Toy,
    assert_adapter_only,
    assert_same_tensors,
    base_of,
    dataset,
    loader,
    outputs,
    snapshot,
    toy_net,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRA, adapter_state_dict, load_from_checkpoint, unmerge
from lightning_lora.layers import LoraLayer

BACKEND = "aot_eager"  # traces forward and backward as inductor does, but compiles no C++


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lora(**settings: Any) -> LoRA:
    return LoRA(**({"r": 4, "target_modules": ["net.0", "net.4"], "summary": False} | settings))


class SilentToy(Toy):
    """Lightning's ``log`` cannot be traced by every version of torch, with or without LoRA."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class CompiledNet(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend=BACKEND)


class CompiledHead(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.compile(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), backend=BACKEND)
        self.net = toy_net()[:6]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))


def fit(tmp_path: Path, model: Any, **settings: Any) -> ModelCheckpoint:
    L.seed_everything(3, verbose=False)
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_last=True, enable_version_counter=False)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer(tmp_path, [lora(), checkpoints], **settings).fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return checkpoints


@pytest.mark.parametrize("part", [False, True])
def test_fit_checkpoint_resume_and_merge(tmp_path: Path, part: bool) -> None:
    def build() -> tuple[Toy, Any]:
        model = CompiledNet() if part else SilentToy()
        return model, model if part else torch.compile(model, backend=BACKEND)

    model, compiled = build()
    base, base_outputs = snapshot(model), outputs(model)
    last = fit(tmp_path, compiled).last_model_path
    assert_adapter_only(last, base)
    merged = outputs(model)
    assert not torch.allclose(merged, base_outputs, atol=1e-3)
    assert model.state_dict().keys() == base.keys()

    resumed, whole = build(), build()
    fit(tmp_path / "resumed", resumed[1], max_epochs=3, ckpt_path=last)
    fit(tmp_path / "whole", whole[1], max_epochs=3)
    assert_same_tensors(snapshot(resumed[0]), snapshot(whole[0]))

    unmerge(model)
    assert all(tensor.any() for tensor in adapter_state_dict(model).values())
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    assert_same_tensors(base_of(model, base), base)


def test_compiled_and_eager_train_alike(tmp_path: Path) -> None:
    eager, compiled = SilentToy(), SilentToy()
    fit(tmp_path / "eager", eager)
    fit(tmp_path / "compiled", torch.compile(compiled, backend=BACKEND))
    torch.testing.assert_close(snapshot(compiled), snapshot(eager), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved_by", [Toy, CompiledNet])
@pytest.mark.parametrize("read_by", [Toy, CompiledNet])
def test_checkpoints_of_compiled_and_eager_models_are_exchanged(
    tmp_path: Path, saved_by: type[Toy], read_by: type[Toy]
) -> None:
    model = saved_by()
    last = fit(tmp_path, model).last_model_path
    torch.testing.assert_close(outputs(load_from_checkpoint(read_by, last)), outputs(model), rtol=1e-4, atol=1e-5)
    resumed = read_by()
    fit(tmp_path / "resumed", resumed, max_epochs=3, ckpt_path=last)
    tested = read_by()
    (losses,) = trainer(tmp_path, [lora()]).test(tested, loader(), ckpt_path=last, verbose=False)
    expected = nn.functional.mse_loss(outputs(model), dataset().tensors[1]).item()
    assert losses["test_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_compiled_module_trained_in_full(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CompiledHead()
    before = snapshot(model)
    callback = lora(target_modules=["net.0", "net.4"], modules_to_save=["head"], merge=None)
    trainer(tmp_path, [callback]).fit(model, loader())
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("head.")}
    assert [name for name, module in model.named_modules() if isinstance(module, LoraLayer)] == ["net.0", "net.4"]


def test_compiled_layers_match_by_name(tmp_path: Path) -> None:
    model = Toy()
    model.net[0] = torch.compile(model.net[0], backend=BACKEND)
    base = snapshot(model)
    last = fit(tmp_path, model).last_model_path
    assert_adapter_only(last, base)
    assert list(model.state_dict()) == list(base)
    unmerge(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == ["net.0._orig_mod", "net.4"]
    torch.testing.assert_close(outputs(load_from_checkpoint(Toy, last)), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    model = SilentToy()
    base = snapshot(model)
    fit(tmp_path, torch.compile(model), limit_val_batches=0)
    unmerge(model)
    assert all(tensor.any() for tensor in adapter_state_dict(model).values())
    assert_same_tensors(base_of(model, base), base)
