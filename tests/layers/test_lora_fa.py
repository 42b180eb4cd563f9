"""LoRA-FA, which freezes A, and rank dropout."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.layers import KINDS, adapters, make, move, run
from helpers.models import tiny_llama
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from lightning_lora.layers.functional import low_rank_linear

IDS = torch.arange(12).view(2, 6)


def test_gradients_of_b_and_x_are_those_with_a_trained() -> None:
    found = []
    for freeze in (True, False):
        model = inject(tiny_llama(), LoraConfig(r=4, freeze_A=freeze))
        move(model)
        model(IDS).logits.square().sum().backward()
        found.append([adapter.lora_B.grad for adapter in adapters(model)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [["net.0", "net.4"], ["net.0"]])
def test_a_run_trains_and_optimizes_b_alone(targets: list[str], tmp_path: Path) -> None:
    lora = LoRA(r=2, target_modules=targets, freeze_A=True, modules_to_save=None, merge=None, summary=False)
    model = toys.Toy()
    trainer = toys.trainer(tmp_path, lora, max_epochs=1)
    trainer.fit(model, toys.loader())
    start = inject(toys.Toy(), lora.config)
    for trained, fresh in zip(adapters(model), adapters(start)):
        assert torch.equal(trained.lora_A, fresh.lora_A) and trained.lora_B.any()
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert sum(name.endswith("lora_A") for name in checkpoint["state_dict"]) == len(targets)
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(targets)


def test_to_peft_it_is_a_plain_lora(tmp_path: Path) -> None:
    model = inject(tiny_llama().eval(), LoraConfig(r=4, freeze_A=True))
    move(model)
    save_adapter(model, tmp_path)
    expected = model(IDS).logits
    for opened in (peft.PeftModel.from_pretrained(tiny_llama(), tmp_path), load_adapter(tiny_llama(), tmp_path)):
        torch.testing.assert_close(opened.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_freezes_its_random_factor() -> None:
    model = inject(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens"], freeze_A=True))
    (adapter,) = adapters(model)
    assert adapter.lora_A.requires_grad and not adapter.lora_B.requires_grad


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_random_factor_is_frozen_and_the_other_learns_as_ever(kind: str, use_dora: bool) -> None:
    if kind == "attention" and use_dora:
        pytest.skip("refused, with or without freeze_A")
    build, x = KINDS[kind]
    gradients, frozen = [], "lora_B" if kind == "embedding" else "lora_A"
    for freeze in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(build())
        inject(model, LoraConfig(r=2, target_modules=["0"], freeze_A=freeze, use_dora=use_dora))
        run(model, x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        factors = {name: p for name, p in model.named_parameters() if name.endswith(frozen)}
        assert factors
        assert all(p.abs().min() > 0 and p.requires_grad is not freeze for p in factors.values())
    expected = {name: gradient for name, gradient in gradients[0].items() if not name.endswith(frozen)}
    assert gradients[1].keys() == expected.keys()
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_input_is_kept_for_a_trained_factor_alone(kind: str, dtype: torch.dtype, frozen: bool) -> None:
    """Kept is the product of rank width, where LoRA keeps the input of ``in_features`` width."""
    layer = inject(make(kind, 64, 48, dtype), LoraConfig(r=2, freeze_A=frozen))
    x = torch.randn(100, 64, dtype=dtype, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = layer(x)
    assert (100 * 64 in kept) is not frozen
    assert 100 * 2 in kept
    out.sum().backward()
    assert x.grad is not None


def test_base_and_path_in_one_pass_gradcheck() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 4), (5, 4), (5,), (2, 4), (5, 2)]
    x, weight, bias, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight, A = weight.detach(), A.detach()

    def one(x: Tensor, bias: Tensor, B: Tensor) -> Tensor:
        return low_rank_linear(x, weight, bias, A, B, 0.7)

    assert torch.autograd.gradcheck(one, (x, bias, B))
    assert torch.autograd.gradgradcheck(one, (x, bias, B))


def test_beside_compile_transforms_and_activation_checkpointing() -> None:
    torch.manual_seed(0)
    layer, x = inject(nn.Linear(6, 5), LoraConfig(r=2, freeze_A=True)), torch.randn(3, 6, requires_grad=True)
    toys.randomize(layer)
    trained = {"lora.default.lora_B": layer.lora["default"].lora_B}  # type: ignore[index]
    layer(x).square().sum().backward()
    expected = trained["lora.default.lora_B"].grad.clone()

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x.detach())
    torch.testing.assert_close(each["lora.default.lora_B"].sum(0), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for forward in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        forward(x).square().sum().backward()
        torch.testing.assert_close(trained["lora.default.lora_B"].grad, expected)


def test_a_run_optimizes_half_and_saves_all(tmp_path: Path) -> None:
    def fit(path: Path, ckpt_path: Any = None) -> Any:
        model = toys.Toy()
        keep = ModelCheckpoint(path, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        lora = LoRA(r=2, freeze_A=True, rank_dropout=0.3, lora_dropout=0.2, summary=False, merge=None)
        torch.manual_seed(1)
        toys.trainer(path, [lora, keep], max_epochs=3).fit(model, toys.loader(shuffle=True), ckpt_path=ckpt_path)
        return model

    whole = fit(tmp_path / "whole")
    middle = tmp_path / "whole" / "epoch=0.ckpt"
    saved = torch.load(middle, weights_only=True)
    assert len(saved["state_dict"]) == 6
    assert len(saved["optimizer_states"][0]["state"]) == 3
    start = adapter_state_dict(inject(toys.Toy(), LoraConfig(r=2)))
    trained = adapter_state_dict(whole)
    for name, tensor in trained.items():
        assert torch.equal(tensor, start[name]) is name.endswith("lora_A")
    toys.assert_same_tensors(adapter_state_dict(fit(tmp_path / "resumed", middle)), trained)


def test_what_is_frozen_stays_frozen_through_a_merge() -> None:
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], freeze_A=True))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    unmerge(merge(model))
    unmerge(eject(model, merge=True))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained == ["0.lora.default.lora_B"]


@pytest.mark.parametrize("kind", [False, "pissa", "olora", "orthogonal", "loftq"])
def test_starts_at_which_b_is_not_zero_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="freeze_A and init_lora_weights="):
        LoraConfig(freeze_A=True, init_lora_weights=kind)
