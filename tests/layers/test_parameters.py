"""LoRA on parameters that a module reads itself: stacked experts beside PEFT, and any matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers import toys
from helpers.models import EXPERT_SIZES, EXPERTS, IDS, mixtral
from torch import Tensor, nn

from lightning_lora import LoRA, LoraConfig, TargetError, eject, inject, load_adapter, merge, save_adapter, unmerge


def qwen3_moe() -> nn.Module:
    torch.manual_seed(0)
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**EXPERT_SIZES, num_experts=3, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:  # its experts are stored transposed
    torch.manual_seed(0)
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**EXPERT_SIZES, num_local_experts=3, num_experts_per_tok=2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


MODELS: list[Callable[[], nn.Module]] = [mixtral, qwen3_moe, gpt_oss]


def settings(**more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS, **more}


@pytest.mark.parametrize("make", MODELS)
def test_experts_beside_peft(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """The same A and B: the same logits, gradients and merged weights, through files both ways."""
    more = {"rank_pattern": {"experts.down_proj": 3}, "use_rslora": True}
    ours = inject(make(), LoraConfig(**settings(**more)))
    before = make()(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, before, rtol=0, atol=0)
    toys.randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, ours(IDS).logits, atol=1e-3)
    ours(IDS).logits.square().sum().backward()
    theirs(IDS).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        adapter = ours.get_submodule(name).lora["default"]["down_proj"]
        adapter.lora_A.data, adapter.lora_B.data = adapter.lora_A.grad, adapter.lora_B.grad  # for PEFT's layout
        for inner, gradient in adapter.peft_tensors().items():
            expected = gradients[f"base_model.model.{name}.{inner.replace('.weight', '.default.weight')}"]
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(opened(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    merged = eject(opened, merge=True)
    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_merging_and_taking_out(make: Callable[[], nn.Module]) -> None:
    model = make()
    base = toys.snapshot(model)
    inject(model, LoraConfig(**settings(target_modules=[])))
    toys.randomize(model)
    adapted = model(IDS).logits
    torch.testing.assert_close(merge(model)(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmerge(model)(IDS).logits, adapted, rtol=0, atol=0)
    toys.assert_same_tensors(toys.snapshot(eject(model)), base)


class Matrix(toys.Toy):
    """A module with a bare parameter, which no layer calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x @ self.projection.T)


def test_a_parameter_of_the_root_in_a_run(tmp_path: Path) -> None:
    lora = LoRA(r=2, target_modules=[], target_parameters=["projection"], modules_to_save=None)
    trainer = toys.trainer(tmp_path, lora, max_epochs=1)
    model = Matrix()
    base = toys.snapshot(model)
    trainer.fit(model, toys.loader())
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"lora.default.projection.lora_{m}" for m in "AB"}
    assert not torch.equal(model.projection, base["projection"])
    trainer.validate(model, toys.loader(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
    toys.assert_same_tensors(toys.snapshot(eject(unmerge(model))), base)


class Held(nn.Module):
    """Matrices in modules that have no forward of their own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        held = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
        self.depth = depth
        self.held: Any = nn.ModuleList([held]) if depth else held
        self.named = nn.ParameterDict({"in": torch.randn(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.held[0] if self.depth else self.held:
            x = (x @ weight).tanh()
        return x @ self.named["in"]


@pytest.mark.parametrize("depth", [0, 1])
def test_matrices_in_lists_and_dicts(tmp_path: Path, depth: int) -> None:
    names = ["held.0.0" if depth else "held.0", "named.in"]
    x = torch.randn(3, 4)
    adapted = inject(Held(depth), LoraConfig(r=2, target_modules=[], target_parameters=names))
    toys.randomize(adapted, 1.0)
    expected = Held(depth)
    state = adapted.state_dict()
    for name in names:
        factors = [state[f"lora.default.{name.replace('.', '_')}.lora_{m}"] for m in "BA"]
        expected.get_parameter(name).data += 8 * factors[0] @ factors[1]
    torch.testing.assert_close(adapted(x), expected(x))
    save_adapter(adapted, tmp_path)
    torch.testing.assert_close(load_adapter(Held(depth), tmp_path)(x), adapted(x))
    adapted(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    torch.testing.assert_close(eject(adapted, merge=True)(x), expected(x))


class Hyper(nn.Module):
    """A layer of which another one changes the weight at each call."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hyper, self.layer = nn.Linear(4, size * 4), nn.Linear(4, size)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.hyper(x).mean(0).view_as(self.layer.weight)
        return torch.func.functional_call(self.layer, {"weight": self.layer.weight + shift}, (x,)) + self.layer(x)


@pytest.mark.parametrize("size", [1, 3])
def test_weights_that_a_functional_call_replaces(size: int) -> None:
    x = torch.randn(5, 4)
    model = inject(Hyper(size), LoraConfig(r=2, target_modules="all-linear"))
    before = [*model.parameters()]
    toys.randomize(model, 1.0)
    merged, state = Hyper(size), model.state_dict()
    for layer, adapter in {"hyper": "hyper.lora.default", "layer": "lora.default.layer_weight"}.items():
        A, B = (state[f"{adapter}.lora_{m}"] for m in "AB")
        merged.get_submodule(layer).weight.data += 8 * B @ A  # type: ignore[operator]
    torch.testing.assert_close(model(x), merged(x))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(eject(model, merge=True)(x), merged(x))


def test_each_expert_starts_like_a_matrix_of_its_own() -> None:
    model = inject(mixtral(), LoraConfig(**settings(r=64)))
    lora_A = model.model.layers[0].mlp.experts.lora["default"]["down_proj"].lora_A
    assert lora_A.shape == (4, 64, 24)
    assert abs(lora_A.abs().max() * 24**0.5 - 1) < 0.01  # uniform up to one over the root of the fan-in
    assert not torch.equal(lora_A[0], lora_A[1])


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is not for parameters"),
        ({"use_dora": True}, "use_dora is not for parameters"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"weight has shape \(16,\)"),
        ({"target_parameters": ["q_proj.weight"]}, "matched by target_modules and its weight by target_parameters"),
        ({"target_modules": [], "target_parameters": ["nope"]}, "nor target_parameters=\\['nope'\\] a parameter"),
    ],
)
def test_what_cannot_be_had(more: dict[str, Any], match: str) -> None:
    model = mixtral()
    with pytest.raises(TargetError, match=match):
        inject(model, LoraConfig(**settings(**more)))
    assert all(parameter.requires_grad for parameter in model.parameters())
