"""DoRA against the paper's formula, made here, and beside PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.layers import make
from helpers.models import IDS, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
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

KINDS = ("linear", "linear without bias", "conv1d")


def adapted(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = inject(make(kind, 12, 10, dtype), LoraConfig(r=3, lora_alpha=6, use_dora=True, **config))
    adapter = layer.lora["default"]  # type: ignore[index]
    with torch.no_grad():
        adapter.lora_B.normal_()
        adapter.lora_magnitude_vector.mul_(torch.rand(10) + 0.5)
    return layer


def reference(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``m V / |V|`` in float64 with the norm held constant, and what has a gradient."""
    adapter = layer.lora["default"]  # type: ignore[index]
    leaves = [adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector, x]
    A, B, m, x = leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight = layer.weight.detach().double()  # type: ignore[union-attr,operator]
    direction = (weight.T if isinstance(layer, Conv1D) else weight) + 2 * B @ A
    weight = m[:, None] * direction / direction.detach().norm(dim=1, keepdim=True)
    bias = getattr(layer, "bias", None)
    return nn.functional.linear(x, weight, None if bias is None else bias.detach().double()), leaves


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_the_formula(kind: str) -> None:
    layer = adapted(kind)
    x = torch.randn(4, 5, 12, requires_grad=True)
    out = layer(x)
    expected, leaves = reference(layer, x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    adapter = layer.lora["default"]  # type: ignore[index]
    found = [adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector, x]
    for tensor, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(tensor.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fresh_adapter_changes_nothing(kind: str, dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    layer = make(kind, 12, 10, dtype)
    x = torch.randn(3, 12, dtype=dtype)
    before = layer(x)
    inject(layer, LoraConfig(r=4, use_dora=True, lora_dropout=dropout))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype)
    base = layer.weight
    x = torch.randn(6, 12, dtype=dtype)
    expected, _ = reference(layer, x)
    merge(layer)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert unmerge(layer).weight is base


def test_a_row_of_zeros_stays_zero() -> None:
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    inject(layer, LoraConfig(r=2, use_dora=True))
    out = layer(torch.randn(5, 4))
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)
    assert torch.isfinite(eject(layer, merge=True).weight).all()


def test_no_matrix_of_the_weights_size_is_kept() -> None:
    layer = inject(nn.Linear(64, 512), LoraConfig(r=2, use_dora=True))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(10, 64))
    assert max(sizes) < 64 * 512


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_beside_peft(make_model: Any, tmp_path: Path) -> None:
    targets = ["q_proj", "up_proj"] if make_model is tiny_llama else ["c_attn", "c_fc"]
    model = inject(make_model(), LoraConfig(r=4, use_dora=True, target_modules=targets)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(model).items():
            tensor.mul_(torch.rand_like(tensor) + 0.5) if "magnitude" in name else tensor.add_(
                torch.randn_like(tensor) / 10
            )
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    for one in (model, theirs):
        one(IDS, labels=IDS).loss.backward()
    mine = [p.grad for n, p in model.named_parameters() if p.requires_grad and "magnitude" in n]
    other = [p.grad for n, p in theirs.named_parameters() if p.requires_grad and "magnitude" in n]
    assert len(mine) == len(other) > 0
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(make_model(), tmp_path / "theirs").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_run_with_dropout_resumes_and_merges(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(path: Path, ckpt_path: Any = None) -> Any:
        torch.manual_seed(len(str(path)))
        model = toys.Toy()
        lora = LoRA(r=2, use_dora=True, lora_dropout=0.2, summary=False)
        keep = ModelCheckpoint(path, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        toys.trainer(path, [lora, keep], max_epochs=3).fit(model, toys.loader(), ckpt_path=ckpt_path)
        return model

    whole = run(tmp_path / "whole")
    base = toys.snapshot(toys.Toy())
    toys.assert_adapter_only(tmp_path / "whole" / "epoch=0.ckpt", base)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "epoch=0.ckpt")
    merged = whole.eval()(toys.inputs())
    assert torch.equal(resumed.eval()(toys.inputs()), merged)
    torch.testing.assert_close(unmerge(whole).eval()(toys.inputs()), merged, rtol=1e-4, atol=1e-5)
    toys.assert_same_tensors(adapter_state_dict(unmerge(resumed)), adapter_state_dict(whole))
    toys.assert_same_tensors(eject(whole).state_dict(), base)


OTHERS: dict[str, tuple[Any, Tensor]] = {
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=2), torch.arange(9).view(3, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", bias=False), torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), torch.randn(1, 4, 4, 4, 4)),
}


def other(kind: str, **config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(OTHERS[kind][0]())
    return inject(model, LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"], **config))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layers_equal_the_formula(kind: str) -> None:
    model = other(kind)
    x = OTHERS[kind][1]
    torch.manual_seed(0)
    plain = OTHERS[kind][0]()
    assert torch.equal(model(x), plain(x))
    toys.randomize(model, 0.2)
    adapter = model[0].lora["default"]
    leaves = [adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector]
    A, B, m = leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight = plain.weight.detach().double()
    out_dim = 1 if kind == "embedding" else 0
    delta = (B.flatten(1) @ A.flatten(1)).T if kind == "embedding" else (B.flatten(1) @ A.flatten(1)).view_as(weight)
    direction = weight + 2 * delta
    norm = direction.detach().transpose(0, out_dim).flatten(1).norm(dim=1)
    factor = (m.flatten() / norm).view([-1 if dim == out_dim else 1 for dim in range(weight.dim())])
    twin = OTHERS[kind][0]().double()
    expected = torch.func.functional_call(
        twin,
        {**dict(plain.double().named_parameters()), "weight": factor * direction},
        x if kind == "embedding" else x.double(),
    )
    out = model(x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    if kind == "embedding":
        upstream[x == 2] = 0  # the row of the padding index gets no gradient
    out.backward(upstream)
    expected.backward(upstream.double())
    for tensor, leaf in zip([adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector], leaves, strict=True):
        torch.testing.assert_close(tensor.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)
    base = model[0].weight
    torch.testing.assert_close(merge(model)(x), out, rtol=1e-4, atol=1e-5)
    assert unmerge(model)[0].weight is base


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layers_beside_peft(kind: str, tmp_path: Path) -> None:
    def plain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(OTHERS[kind][0]())

    x = OTHERS[kind][1]
    model = other(kind)
    toys.randomize(model, 0.2)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(load_adapter(plain(), tmp_path / "theirs")(x), model(x), rtol=1e-5, atol=1e-5)


def test_convolutions_with_dropout_scale_what_they_see() -> None:
    model = other("conv1d", lora_dropout=0.5)
    toys.randomize(model, 0.2)
    x = OTHERS["conv1d"][1]
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    trained = model(x)
    model.eval()
    layer = model[0]
    base = nn.functional.conv1d(x, layer.weight, layer.bias, 2, 1)
    # What the adapter adds, it adds as to the dropped input.
    expected = base + model(dropped) - nn.functional.conv1d(dropped, layer.weight, layer.bias, 2, 1)
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
