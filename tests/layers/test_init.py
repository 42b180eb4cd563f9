"""Starts other than the default, beside PEFT's, and those that take a part out of the base weight."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.layers import make
from helpers.models import IDS, tiny_gpt2, tiny_llama
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import (
    CheckpointError,
    LoRA,
    LoraConfig,
    adapter_state_dict,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)

FROM_BASE = ("pissa", "pissa_niter_8", "olora")


def start(layer: nn.Module, kind: str, **config: Any) -> nn.Module:
    return inject(layer, LoraConfig(r=4, lora_alpha=8, init_lora_weights=kind, **config))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_start_is_pefts(kind: str) -> None:
    torch.manual_seed(0)
    plain = make("linear", 12, 10)
    model = nn.Sequential(make("linear", 12, 10))
    model[0].load_state_dict(plain.state_dict())
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=kind, target_modules=["0"])
    ).base_model.model[0]
    ours = start(plain, kind).lora["default"]  # type: ignore[index]
    torch.testing.assert_close(ours.lora_A, theirs.lora_A["default"].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.lora_B, theirs.lora_B["default"].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.weight, theirs.base_layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FROM_BASE)
@pytest.mark.parametrize("layer_kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(12, 10), (8, 8), (5, 20)])
def test_the_function_changes_by_rounding_alone(kind: str, layer_kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = make(layer_kind, *shape)
    x = torch.randn(7, shape[0])
    before, weight, bits = layer(x), layer.weight, layer.weight.detach().clone()  # type: ignore[operator]
    start(layer, kind)
    assert layer.weight is weight  # what hangs on it stays: hooks, attributes, ties
    assert not torch.allclose(layer.weight, bits, atol=1e-3)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    merge(layer)
    torch.testing.assert_close(layer.weight.detach(), bits, rtol=1e-5, atol=1e-6)
    eject(unmerge(layer))
    assert layer.weight is weight
    assert torch.equal(weight, bits)  # type: ignore[arg-type]
    assert weight.requires_grad


def test_pissa_is_the_principal_part() -> None:
    torch.manual_seed(0)
    values = 0.5 ** torch.arange(10.0)
    left, right = (torch.linalg.qr(torch.randn(size, 10)).Q for size in (10, 12))
    exact, fast = nn.Linear(12, 10), nn.Linear(12, 10)
    for layer, kind in ((exact, "pissa"), (fast, "pissa_niter_16")):
        layer.weight.data = left * values @ right.T
        start(layer, kind)
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight)[:6], values[4:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fast.weight, exact.weight, rtol=1e-3, atol=1e-5)


def test_orthogonal_start() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 10)
    x = torch.randn(7, 12)
    before = layer(x)
    adapter = start(layer, "orthogonal").lora["default"]
    assert adapter.lora_A.abs().max() > 0.01
    assert adapter.lora_B.abs().max() > 0.01
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    again = start(nn.Linear(12, 10), "orthogonal").lora["default"]
    assert torch.equal(again.lora_A, adapter.lora_A)


@pytest.mark.parametrize("kind", FROM_BASE)
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q": 3}}]
)
@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_the_export_is_right_on_the_original_base(
    kind: str, settings: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    targets = ["q_proj", "up_proj"] if make_model is tiny_llama else ["c_attn", "c_fc"]
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=kind, target_modules=targets, **settings)
    model = inject(make_model(), config).eval()
    toys.randomize(model, 0.05)
    save_adapter(model, tmp_path)
    expected = model(IDS).logits
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    ours = load_adapter(make_model(), tmp_path).eval()
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make_model().eval()(IDS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_we_open_what_peft_saves_without_conversion(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=kind, target_modules=["q_proj"])
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    toys.randomize(theirs, 0.05)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FROM_BASE)
def test_a_run_resumes_without_the_base_in_its_checkpoint(kind: str, tmp_path: Path) -> None:
    def run(path: Path, ckpt_path: Any = None, **settings: Any) -> Any:
        model = toys.Toy(dropout=0.0)
        lora = LoRA(**{"r": 1, "init_lora_weights": kind, "summary": False} | settings)
        keep = ModelCheckpoint(path, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        toys.trainer(path, [lora, keep], max_epochs=3).fit(model, toys.loader(), ckpt_path=ckpt_path)
        return model

    base = toys.snapshot(toys.Toy())
    whole = run(tmp_path / "whole")
    middle = tmp_path / "whole" / "epoch=0.ckpt"
    toys.assert_adapter_only(middle, base)
    assert len(torch.load(middle, weights_only=True)["state_dict"]) == 6
    resumed = run(tmp_path / "resumed", middle)
    toys.assert_same_tensors(resumed.state_dict(), whole.state_dict())
    toys.assert_same_tensors(adapter_state_dict(unmerge(resumed)), adapter_state_dict(unmerge(whole)))
    toys.assert_same_tensors(eject(resumed).state_dict(), base)
    with pytest.raises(CheckpointError, match=rf"init_lora_weights \('{kind}' saved, True here\)"):
        run(tmp_path / "other", middle, init_lora_weights=True)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        LoraConfig(use_dora=True, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="even ranks, but there is 3"):
        LoraConfig(r=4, rank_pattern={"a": 3}, init_lora_weights="orthogonal")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    weights = [layer.weight for layer in model]
    with pytest.raises(ValueError, match=r"at a part of rank 4 of its weight, which has shape \(2, 8\)"):
        start(model, "pissa")
    assert [layer.weight for layer in model] == weights
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)
