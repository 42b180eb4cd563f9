"""LoftQ: the quantizers beside their definitions, the start beside the paper's algorithm, and the life of a run."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.layers import make
from helpers.models import IDS, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import CheckpointError, LoRA, LoraConfig, eject, inject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.layers.loftq import NF4, int8, loftq, nf4

KINDS = ("loftq", "loftq_8", "loftq_4_niter_5", "loftq_8_niter_2")


def config(kind: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": kind} | settings)


def test_the_code_book_is_made_of_quantiles() -> None:
    # QLoRA's definition: evenly spaced quantiles, eight above zero and seven below, so that zero is one of them.
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(0.5, offset, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(0.5, offset, 8, dtype=torch.float64))
    expected = torch.cat([below.flip(0), above[1:]]) / above[-1]
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 150), st.integers(0, 99))
def test_quantizing_takes_the_nearest_code_of_each_block(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    flat = weight.flatten()
    expected = []
    for block in flat.split(64):
        codes = torch.tensor(NF4) * block.abs().max()
        expected.append(codes[(block.unsqueeze(1) - codes).abs().argmin(1)])
    found = nf4(weight)
    torch.testing.assert_close(found.flatten(), torch.cat(expected), rtol=1e-6, atol=1e-7)
    assert torch.equal(nf4(found), found)
    rounded = int8(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((weight - rounded).abs() <= step * 0.5001).all()
    torch.testing.assert_close(rounded / step, (rounded / step).round(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(int8(rounded), rounded, rtol=1e-5, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(nf4(torch.zeros(3, 70)), torch.zeros(3, 70))
    assert torch.equal(int8(torch.zeros(3, 70)), torch.zeros(3, 70))


@pytest.mark.parametrize(("kind", "quantize"), [("loftq_4_niter_{}", nf4), ("loftq_8_niter_{}", int8)])
def test_the_start_is_that_of_the_papers_algorithm(kind: str, quantize: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    plain = (weight - quantize(weight)).norm()
    product, errors = torch.zeros(48, 64), [plain]
    for iterations in range(1, 6):
        expected = quantize(weight - product)
        left, values, right = torch.linalg.svd(weight - expected)
        product = left[:, :8] @ values[:8].diag() @ right[:8]
        quantized, lora_B, lora_A = loftq(weight, kind.format(iterations), 8)
        torch.testing.assert_close(quantized, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lora_B @ lora_A, product, rtol=1e-4, atol=1e-5)
        errors.append((weight - quantized - lora_B @ lora_A).norm())
    assert errors[1] < 0.9 * plain
    assert errors[5] < errors[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_starts_nearer_than_the_quantized_base_and_comes_back(
    kind: str, layer_kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = make(layer_kind, 64, 48).to(dtype)
    weight, bits = layer.weight, layer.weight.detach().clone()
    inject(layer, config(kind, use_rslora=True))
    adapter: Any = layer.lora["default"]  # type: ignore[index]
    quantized = layer.weight.detach().clone()  # type: ignore[operator]
    assert quantized.dtype == dtype and not torch.equal(quantized, bits)  # type: ignore[arg-type]
    error = (bits.float() - quantized.float() - adapter.delta_weight()).norm()  # type: ignore[operator]
    assert error < 0.95 * (bits.float() - quantized.float()).norm()  # type: ignore[operator]
    merge(layer)
    unmerge(layer)
    assert torch.equal(layer.weight, quantized)  # type: ignore[arg-type]
    eject(layer)
    assert layer.weight is weight and torch.equal(weight, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_a_plain_lora_on_the_quantized_base(kind: str, tmp_path: Path) -> None:
    model = inject(tiny_llama(), config(kind, target_modules=["q_proj", "up_proj"])).eval()
    toys.randomize(model, 0.05)
    save_adapter(model, tmp_path)
    expected = model(IDS).logits
    again = load_adapter(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    base = tiny_llama()
    for name, parameter in base.named_parameters():
        parameter.data = model.get_parameter(name).data
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(IDS).logits, expected, atol=1e-4
    )


def test_one_iteration_leaves_the_plain_quantized_base() -> None:
    model, base = inject(tiny_llama(), config("loftq", target_modules=["q_proj"])), tiny_llama()
    for index, block in enumerate(base.model.layers):
        expected = nf4(block.self_attn.q_proj.weight.detach())
        assert torch.equal(model.model.layers[index].self_attn.q_proj.weight, expected)


def test_an_adapter_is_not_put_on_another_base(tmp_path: Path) -> None:
    for name, kind in (("quantized", "loftq"), ("plain", True)):
        model = inject(tiny_llama(), config(kind, target_modules=["q_proj"]))  # type: ignore[arg-type]
        save_adapter(model, tmp_path / name)
    for name, kind in (("quantized", True), ("quantized", "loftq_8"), ("plain", "loftq")):
        model = inject(tiny_llama(), config(kind, target_modules=["q_proj"]))  # type: ignore[arg-type]
        before = toys.snapshot(model)
        with pytest.raises(CheckpointError, match="use the init_lora_weights with which it was saved"):
            load_adapter(model, tmp_path / name)
        toys.assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_without_the_base_in_its_checkpoint(kind: str, tmp_path: Path) -> None:
    def run(path: Path, ckpt_path: Any = None, **settings: Any) -> Any:
        model = toys.Toy()
        lora = LoRA(**{"r": 1, "init_lora_weights": kind, "summary": False} | settings)
        keep = ModelCheckpoint(path, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        toys.trainer(path, [lora, keep], max_epochs=3).fit(model, toys.loader(), ckpt_path=ckpt_path)
        return model

    base = toys.snapshot(toys.Toy())
    whole = run(tmp_path / "whole")
    middle = tmp_path / "whole" / "epoch=0.ckpt"
    assert len(torch.load(middle, weights_only=True)["state_dict"]) == 6  # A and B of three layers
    resumed = run(tmp_path / "resumed", middle)
    toys.assert_same_tensors(resumed.state_dict(), whole.state_dict())
    toys.assert_same_tensors(eject(unmerge(resumed)).state_dict(), base)
    with pytest.raises(CheckpointError, match=rf"init_lora_weights \('{kind}' saved, True here\)"):
        run(tmp_path / "other", middle, init_lora_weights=True)


@pytest.mark.parametrize("kind", ["loftq_2", "loftq_niter_5", "loftq_4_niter_0", "loftq_4_"])
def test_unknown_names_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="'loftq_<4 or 8 bits>_niter_<number of iterations>'"):
        config(kind)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        config("loftq", use_dora=True)
    layer = nn.Linear(8, 2)
    weight = layer.weight
    with pytest.raises(ValueError, match=r"at a part of rank 4 of its weight, which has shape \(2, 8\)"):
        inject(layer, config("loftq"))
    assert layer.weight is weight and type(layer) is nn.Linear
