"""LoRA-FA, which freezes A, and rank dropout."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toys
from test_fused import gpt2
from test_parameters import EXPERTS, mixtral
from test_targets import tiny_llama
from torch import nn

from lightning_lora import LoRA, LoraConfig, inject, load_adapter, save_adapter
from lightning_lora.layers import LoraLayer

IDS = torch.arange(12).view(2, 6)


def adapters(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def test_a_linear_layer_does_not_keep_its_input() -> None:
    kept: dict[bool, list[torch.Size]] = {True: [], False: []}
    for freeze, sizes in kept.items():
        layer = inject(nn.Linear(64, 32), LoraConfig(r=4, freeze_A=freeze))
        x = torch.randn(100, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.shape) or t, lambda t: t):
            out = layer(x)
        out.sum().backward()
        assert (layer.lora["default"].lora_A.grad is None) is freeze
        assert layer.lora["default"].lora_B.grad is not None and x.grad is not None
    assert torch.Size([100, 64]) in kept[False] and torch.Size([100, 64]) not in kept[True]


def test_gradients_of_b_and_x_are_those_with_a_trained() -> None:
    found = []
    for freeze in (True, False):
        model = inject(tiny_llama(), LoraConfig(r=4, freeze_A=freeze))
        move(model)
        model(IDS).logits.square().sum().backward()
        found.append([adapter.lora_B.grad for adapter in adapters(model)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def move(model: nn.Module) -> None:
    torch.manual_seed(1)
    for adapter in adapters(model):
        nn.init.normal_(adapter.lora_B, std=0.1)


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


@pytest.mark.parametrize("kind", [False, "pissa", "olora", "orthogonal", "loftq"])
def test_starts_at_which_b_is_not_zero_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="freeze_A and init_lora_weights="):
        LoraConfig(freeze_A=True, init_lora_weights=kind)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"target_modules": "all-linear"}),
        (tiny_llama, {"target_modules": ["embed_tokens"]}),
        (tiny_llama, {"target_modules": ["v_proj"], "use_dora": True}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
        (gpt2, {"target_modules": ["c_attn"], "fused_qkv": ["q", "v"]}),
        (mixtral, {"target_modules": [], "target_parameters": EXPERTS}),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), {"target_modules": ["0"]}),
    ],
    ids=["linear", "embedding", "dora", "conv1d", "fused", "experts", "groups"],
)
def test_rank_dropout_drops_components_in_training_alone(make: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    run = (lambda: model(torch.ones(2, 4, 3))) if isinstance(model, nn.Sequential) else (lambda: model(IDS).logits)
    inject(model, LoraConfig(r=4, rank_dropout=0.5, **settings))
    move(model)
    for adapter in adapters(model):
        nn.init.normal_(adapter.lora_A, std=0.1)
    plain = run()
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
    for module in model.modules():  # the adapters alone, since the model may have dropout of its own
        if isinstance(module, LoraLayer):
            module.lora.train()
    outs = [run() for _ in range(8)]
    assert any(not torch.equal(outs[0], other) for other in outs[1:])


def test_rank_dropout_has_the_plain_function_as_its_mean() -> None:
    layer = inject(nn.Linear(6, 5), LoraConfig(r=8, rank_dropout=0.25))
    torch.manual_seed(0)
    nn.init.normal_(layer.lora["default"].lora_B)
    x = torch.randn(3, 6)
    kept = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(kept, layer.eval()(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_rank_dropout_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"rank_dropout is .*must lie in \[0, 1\)"):
        LoraConfig(rank_dropout=value)
