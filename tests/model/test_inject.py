import copy
from abc import ABC
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import tiny_classifier, tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_lora import (
    LoraConfig,
    TargetError,
    adapter_state_dict,
    delete_adapter,
    eject,
    inject,
    load_adapter_state_dict,
    unmerge,
)
from lightning_lora.model.freeze import FrozenNorm
from lightning_lora.model.state_dict import CheckpointError


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that an observer can see of a model: classes, attributes, keys, flags, modes, and the tensors' identity."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "modes": {name: module.training for name, module in model.named_modules()},
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "methods": {name: module.forward.__func__ for name, module in model.named_modules()},
    }


def assert_same(before: dict, after: dict, *, values: bool = True, identities: bool = True) -> None:
    for what in ("classes", "attributes", "flags", "modes", "methods", *(["parameters"] if identities else [])):
        assert before[what] == after[what], what
    assert list(before["values"]) == list(after["values"])
    if values:
        assert all(torch.equal(tensor, after["values"][name]) for name, tensor in before["values"].items())


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))


def train_a_little(model: nn.Module, *inputs: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        out = model(*inputs)
        (out.logits if hasattr(out, "logits") else out).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS = {
    "net with BatchNorm": (conv_net, torch.randn(8, 4), {}),
    "causal LM": (tiny_llama, torch.arange(12).view(2, 6), {}),
    "tied causal LM": (lambda: tiny_llama(tie_word_embeddings=True), torch.arange(12).view(2, 6), {}),
    "classifier with a new head": (tiny_classifier, torch.arange(12).view(2, 6), {}),
    "all biases": (tiny_classifier, torch.arange(12).view(2, 6), {"bias": "all"}),
    "biases of adapted layers": (tiny_classifier, torch.arange(12).view(2, 6), {"bias": "lora_only"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_ejecting_leaves_no_trace(name: str) -> None:
    make, x, settings = MODELS[name]
    model = make()
    model.requires_grad_(True)
    before = snapshot(model)
    inject(model, LoraConfig(r=2, **settings))
    train_a_little(model, x)
    eject(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", MODELS)
def test_merging_out_and_back(name: str) -> None:
    make, x, settings = MODELS[name]
    model = make()
    before = snapshot(model)
    inject(model, LoraConfig(r=2, **settings))
    train_a_little(model, x)
    model.eval()
    adapter = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    with torch.no_grad():
        adapted = model(x)
        eject(model, merge=True)
        merged = model(x)
    merged, adapted = (out.logits if hasattr(out, "logits") else out for out in (merged, adapted))
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    model.train()
    assert_same(before, snapshot(model), values=False, identities=False)
    unmerge(model)
    for key, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter[key])
    eject(model)
    assert_same(before, snapshot(model))


def test_only_adapters_and_heads_move() -> None:
    model = tiny_classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, LoraConfig(r=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora." in n} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert trainable == set(adapter_state_dict(model))
    train_a_little(model, torch.arange(12).view(2, 6))
    after = model.state_dict()
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert all(
        torch.equal(before[name], after[name]) for name in before.keys() - {"classifier.weight", "classifier.bias"}
    )


def test_frozen_statistics_do_not_move_and_are_used() -> None:
    model = conv_net()
    model(torch.randn(16, 4) * 3 + 1)
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    inject(model, LoraConfig(r=2)).train()
    assert isinstance(model[1], FrozenNorm)
    x = torch.randn(16, 4)
    model.train()
    trained_mode = model[1](model[0](x))
    assert all(torch.equal(before[name], tensor) for name, tensor in model[1].state_dict().items())
    assert torch.equal(trained_mode, model.eval()[1](model[0](x)))
    assert model.train()[2].training


def test_a_trained_norm_is_left_alone() -> None:
    model = inject(conv_net(), LoraConfig(r=2, modules_to_save=["1"]))
    model(torch.randn(16, 4))
    assert model[1].num_batches_tracked == 1
    assert {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(
        adapter_state_dict(model)
    )


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def values(**settings: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed() % 2**32)
        return adapter_state_dict(inject(tiny_llama(), LoraConfig(r=2, **settings)))  # type: ignore[arg-type]

    every, some = values(), values(target_modules=["v_proj"])
    assert all(torch.equal(tensor, every[name]) for name, tensor in some.items())
    assert any(not torch.equal(tensor, every[name]) for name, tensor in values(seed=1).items())
    A = [tensor for name, tensor in every.items() if name.endswith("q_proj.lora.default.lora_A")]
    assert not torch.equal(A[0], A[1])
    assert all((tensor == 0).all() for name, tensor in every.items() if name.endswith("lora_B"))
    bound = 1 / 32**0.5  # Kaiming-uniform with a = sqrt(5): one over the root of the fan-in
    assert 0.9 * bound < A[0].abs().max() <= bound
    gaussian = values(init_lora_weights="gaussian")
    assert 0.3 < torch.cat([t.flatten() for n, t in gaussian.items() if n.endswith("lora_A")]).std() < 0.7


def test_injecting_again_does_nothing_and_over_another_is_refused() -> None:
    model = inject(tiny_llama(), LoraConfig(r=2))
    before = snapshot(model)
    inject(model, LoraConfig(r=2))
    assert_same(before, snapshot(model))
    with pytest.raises(TargetError, match=r"already carry an adapter \('default' with LoraConfig\(r=2"):
        inject(model, LoraConfig(r=3))
    with pytest.raises(TargetError, match="give each adapter a name or layers of its own"):
        inject(model, LoraConfig(r=3, target_modules=["q_proj"]))
    assert_same(before, snapshot(model))


def test_two_adapters_on_layers_of_their_own() -> None:
    model = tiny_llama()
    before = snapshot(model)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    inject(model, LoraConfig(r=3, target_modules=["v_proj"]))
    assert len(adapter_state_dict(model)) == 2 * 2 * 3
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_state_dict(model))
    train_a_little(model, torch.arange(12).view(2, 6))
    eject(model, merge=True)
    unmerge(model)
    eject(model)
    assert_same(before, snapshot(model))


def test_merging_a_tied_head_leaves_the_embedding() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    bits = embedding.detach().clone()
    inject(model, LoraConfig(r=2, target_modules=["lm_head"]))
    train_a_little(model, torch.arange(12).view(2, 6))
    eject(model, merge=True)
    assert not torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(embedding, bits)
    eject(unmerge(model))
    assert model.lm_head.weight is embedding is model.model.embed_tokens.weight


def test_state_dict_round_trip_and_what_does_not_fit() -> None:
    model = inject(tiny_classifier(), LoraConfig(r=2))
    train_a_little(model, torch.arange(12).view(2, 6))
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    fresh = inject(tiny_classifier(), LoraConfig(r=2))
    untouched = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    first, *_ = state
    for bad, message in (
        ({k: v for k, v in state.items() if k != first}, f"missing: {first}"),
        ({**state, "extra": state[first]}, "left over: extra"),
        ({**state, first: state[first][:1]}, rf"of another shape: {first} \(\(1, 32\) found, \(2, 32\) expected\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_adapter_state_dict(fresh, bad)
        assert all(torch.equal(untouched[name], tensor) for name, tensor in fresh.state_dict().items())
    load_adapter_state_dict(fresh, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter_state_dict(fresh).items())


def test_base_weights_go_with_the_model() -> None:
    """Folded weights are kept aside, not on the model, and are freed with it."""
    import gc
    import weakref

    model = inject(conv_net(), LoraConfig(r=2))
    base = weakref.ref(model[0].weight)
    eject(model, merge=True)
    assert base() is not None
    twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert base() is None
    assert unmerge(twin) is twin


class _Marked(ABC):  # noqa: B024
    pass


class _MarkedLinear(_Marked, nn.Linear):
    """A linear layer to which Python gives no other class, as the one of quanto is."""


def test_a_layer_whose_class_cannot_be_changed_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), _MarkedLinear(8, 8))
    with pytest.raises(TargetError, match=r"'1'.*Python cannot give it another class"):
        inject(model, LoraConfig(r=2))
    assert [type(layer) for layer in model] == [nn.Linear, _MarkedLinear]
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject(model, LoraConfig(r=2, target_modules=["0"]))  # and nothing is in the way


@pytest.mark.parametrize("name", ["a.b", "", "items", 3])
def test_a_name_that_no_adapter_can_have(name: Any) -> None:
    model = tiny_llama()
    before = toys.snapshot(model)
    with pytest.raises(TargetError, match=r"adapter_name is .* without dots"):
        inject(model, LoraConfig(r=2), name)
    toys.assert_same_tensors(toys.snapshot(model), before)


def test_a_model_that_peft_has_wrapped_is_refused() -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for wrapped, named in ((model, "The model"), (nn.Sequential(model), "'0'"), (model.base_model.model, "q_proj")):
        with pytest.raises(TargetError, match=rf"{named}.* of PEFT: its adapter would be adapted"):
            inject(wrapped, LoraConfig(r=2))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    merged = model.merge_and_unload()
    assert inject(merged, LoraConfig(r=2)) is merged


class Blocks(nn.Module):
    """Norms in places that are called, and in some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.rest = nn.ModuleList(
            [nn.ModuleDict({"norm": nn.BatchNorm1d(4), "layer": nn.Linear(4, 4)}), nn.Linear(4, 4)]
        )
        self.last = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.rest[1](self.rest[0]["layer"](self.rest[0]["norm"](x))))


@pytest.mark.parametrize("copied", [False, True])
def test_norms_stay_frozen_where_others_take_their_place(copied: bool) -> None:
    model = inject(Blocks(), LoraConfig(r=2))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model) if copied else model)
    x = torch.randn(8, 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = model.eval()(x)
    assert torch.equal(model.train()(x), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    eject(model)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    model(x)
    assert not torch.equal(model.last.running_mean, before["last.running_mean"])


@pytest.mark.parametrize("outer_first", [True, False])
@pytest.mark.parametrize("outer_stays", [True, False])
def test_the_base_of_another_injection_stays_frozen(outer_first: bool, outer_stays: bool) -> None:
    """One goes, and the base of the other stays frozen, also where other norms take the place of those there."""
    model = nn.Sequential(nn.BatchNorm1d(4), Blocks())
    outer, inner = (model, "outer"), (model[1], "inner")
    for root, name in (outer, inner) if outer_first else (inner, outer):
        inject(root, LoraConfig(r=2), name)
    stays = outer if outer_stays else inner
    delete_adapter(*(inner if outer_stays else outer))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model.train())
    before = {name: buffer.clone() for name, buffer in model[1].named_buffers()}
    model(torch.randn(8, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model[1].named_buffers())
    assert not any(p.requires_grad for name, p in stays[0].named_parameters() if ".lora." not in name)
    eject(stays[0])
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("saved", [["wte", "lm_head"], ["lm_head"], ["wte"]])
@pytest.mark.parametrize("trains", [True, False])
def test_tied_weights_train_again_as_they_did(saved: list[str], trains: bool) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    model.lm_head.weight.requires_grad_(trains)
    before = snapshot(model)
    eject(inject(model, LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=saved)))
    after = snapshot(model)
    assert [after[what] for what in ("flags", "parameters", "modes")] == [
        before[what] for what in ("flags", "parameters", "modes")
    ]
