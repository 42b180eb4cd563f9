"""Rank dropout: whole rank components are dropped while training, and nothing is otherwise."""

from typing import Any

import pytest
import torch
from helpers.layers import KINDS, adapters, move, run
from helpers.models import EXPERTS, gpt2, mixtral, tiny_llama
from torch import nn

from lightning_lora import LoraConfig, inject
from lightning_lora.layers import LoraLayer

SETTINGS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}, "LoRA-FA": {"freeze_A": True}}


def adapted(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind][0]())
    inject(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, **settings))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_computes_some_of_the_components_scaled_up(kind: str) -> None:
    x = KINDS[kind][1]
    model, plain = adapted(kind, rank_dropout=0.5), adapted(kind)
    parts = [name for name, p in plain.named_parameters() if name.endswith("lora_B")]
    originals = {name: plain.get_parameter(name).detach().clone() for name in parts}

    def keeping(components: tuple[int, ...]) -> torch.Tensor:
        """The output where of each B these columns alone are left, twice as large."""
        for name in parts:
            factor = plain.get_parameter(name)
            dim = -1 if kind == "attention" else 1
            mask = torch.tensor([2.0 if i in components else 0.0 for i in range(3)])
            shape = [1] * factor.dim()
            shape[dim] = 3
            factor.data = originals[name] * mask.view(shape)
        return run(plain, x)

    def drawn(seed: int) -> tuple[int, ...]:
        torch.manual_seed(seed)
        return tuple(torch.nn.functional.dropout(torch.ones(3), 0.5).nonzero().flatten().tolist())

    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = run(model, x)
        if len(parts) == 1:
            seen.add(drawn(seed))
            torch.testing.assert_close(out, keeping(drawn(seed)), rtol=1e-5, atol=1e-5)
        else:
            seen.add(float(out.detach().sum()))  # each of its parameters draws its own
    assert len(seen) > 3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "convolution"])
def test_the_mean_is_the_function_without_it(kind: str, settings: dict[str, Any]) -> None:
    if settings.get("freeze_A"):
        settings = settings | {"init_lora_weights": True}
    x = KINDS[kind][1]
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind][0]())
    inject(model, LoraConfig(**{"r": 3, "target_modules": ["0"], "init_lora_weights": False} | settings,
                             rank_dropout=0.25))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        mean = torch.stack([run(model, x) for _ in range(3000)]).mean(0)
        expected = run(model.eval(), x)
    assert (mean - expected).abs().max() < 0.06 * expected.abs().max()


def test_nothing_is_drawn_in_evaluation_or_without_it() -> None:
    x = KINDS["linear"][1]
    model, plain = adapted("linear", rank_dropout=0.5), adapted("linear")
    state = torch.get_rng_state()
    assert torch.equal(run(model.eval(), x), run(plain.eval(), x))
    run(plain.train(), x)
    assert torch.equal(torch.get_rng_state(), state)
    run(model.train(), x)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_dropped_component_gets_no_gradient() -> None:
    model = adapted("linear", rank_dropout=0.5)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(torch.ones(3), 0.5) == 0
    assert 0 < dropped.sum() < 3
    torch.manual_seed(3)
    run(model, KINDS["linear"][1]).square().sum().backward()
    adapter = model[0].lora["default"]
    assert torch.equal(adapter.lora_B.grad.abs().amax(0) == 0, dropped)
    assert torch.equal(adapter.lora_A.grad.abs().amax(1) == 0, dropped)


IDS = torch.arange(12).view(2, 6)


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
