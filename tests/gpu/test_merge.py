"""Folding in and taking out on a device: rounded once, and undone bit for bit."""

import pytest
import torch
from helpers import toys
from helpers.models import IDS, tiny_llama
from helpers.toys import assert_same_tensors, snapshot

from lightning_lora import LoraConfig, eject, inject, merge, unmerge

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_rounded_once_and_undone_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    model = tiny_llama().to(device, dtype)
    base = snapshot(model)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"]))
    toys.randomize(model)
    layer = model.model.layers[0].mlp.up_proj
    adapter = layer.lora["default"]
    exact = layer.weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    merge(model)
    assert layer.weight.device.type == device
    assert not torch.equal(layer.weight, base["model.layers.0.mlp.up_proj.weight"])
    # Half a step of the dtype, and what float32 may be off before it is rounded.
    room = exact.abs() * (torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps) + 1e-7
    assert ((layer.weight.double() - exact).abs() <= room).all()
    unmerge(model)
    assert_same_tensors({name: tensor for name, tensor in model.state_dict().items() if name in base}, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_with_its_adapter_ejected_is_the_base(device: str, dtype: torch.dtype) -> None:
    model = tiny_llama().to(device, dtype).eval()
    base, ids = snapshot(model), IDS.to(device)
    with torch.no_grad():
        expected = model(ids).logits
        inject(model, LoraConfig(r=4))
        assert torch.equal(model(ids).logits, expected)  # a fresh adapter adds zero
        toys.randomize(model)
        assert not torch.equal(model(ids).logits, expected)
        eject(model)
        assert torch.equal(model(ids).logits, expected)
    assert_same_tensors(model.state_dict(), base)
