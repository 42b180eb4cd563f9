"""Many adapters on one base: chosen, mixed in a batch, trained side by side, deleted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import tiny_classifier, tiny_gpt2, tiny_llama
from helpers.several_adapters import DE, FR, IDS, alone, logits, moved, two
from helpers.texts import word_model
from torch import Tensor, nn

from lightning_lora import (
    LoRA,
    LoraConfig,
    TargetError,
    active_adapters,
    adapters,
    adapters_for,
    add_adapter,
    delete_adapter,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_lora.layers import LoraLayer


def test_choosing_adapters(tmp_path: Path) -> None:
    base = tiny_llama().eval()
    model = two()
    assert list(adapters(model)) == ["fr", "de"]
    assert adapters(model)["de"] == DE
    assert active_adapters(model) == ["fr"]
    for name in ("fr", "de"):
        save_adapter(model, tmp_path / name, name)
        reference = peft.PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / name)
        torch.testing.assert_close(alone(model, name), logits(reference), rtol=1e-5, atol=1e-5)
        assert active_adapters(model) == [name]
    assert torch.equal(logits(set_adapter(model, None)), logits(base))
    reference = peft.PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "fr", adapter_name="fr")
    reference.load_adapter(tmp_path / "de", "de")
    reference.base_model.set_adapter(["fr", "de"])
    torch.testing.assert_close(logits(set_adapter(model, ["fr", "de"])), logits(reference), rtol=1e-5, atol=1e-5)


def test_no_weight_is_touched_or_copied() -> None:
    model = two()
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for name in ("de", "fr", None, ["fr", "de"]):
        set_adapter(model, name)
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers


def test_disabled_is_the_base_and_passes() -> None:
    model = two()
    set_adapter(model, ["fr", "de"])
    before = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny_llama().eval()))
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_base_is_whole_beside_a_start_that_was_taken_out_of_it(kind: str) -> None:
    model = inject(tiny_llama().eval(), LoraConfig(r=2, init_lora_weights=kind))
    moved(model)
    adapted = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny_llama().eval()))
    assert torch.equal(logits(model), adapted)
    with pytest.raises(TargetError, match="starts at a part of the base's weights"):
        add_adapter(model, FR, "fr")
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize(
    ("make", "targets", "more"),
    [
        (tiny_llama, ["q_proj", "v_proj"], {}),
        (tiny_llama, ["embed_tokens", "down_proj"], {}),
        (tiny_llama, "all-linear", {"use_dora": True}),
        (tiny_gpt2, ["c_attn", "c_fc"], {}),
    ],
)
def test_a_batch_of_several_adapters(make: Callable[[], nn.Module], targets: Any, more: dict[str, Any]) -> None:
    config = [LoraConfig(r=r, target_modules=targets, **more) for r in (2, 3)]
    model = two(make, *config)
    names = ["fr", "de", None, "fr"]
    expected = [alone(model, name, IDS[i : i + 1]) for i, name in enumerate(names)]
    set_adapter(model, "de")
    with adapters_for(model, names):
        found = logits(model)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert active_adapters(model) == ["de"]
    torch.testing.assert_close(logits(model), alone(model, "de"))


def test_rows_that_are_several_to_a_sample() -> None:
    model = two(lambda: nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2), LoraConfig(r=2))
    x = torch.randn(6, 4)
    with adapters_for(model, ["fr", None, "de"]):
        found = model(x)
    for rows, name in ((slice(0, 2), "fr"), (slice(2, 4), None), (slice(4, 6), "de")):
        torch.testing.assert_close(found[rows], set_adapter(model, name)(x)[rows])
    with adapters_for(model, ["fr", None, "de", "de", None, None]):
        found = model(x)
    for rows, name in (((0,), "fr"), ((1, 4, 5), None), ((2, 3), "de")):
        torch.testing.assert_close(found[list(rows)], set_adapter(model, name)(x)[list(rows)])
    with adapters_for(model, ["fr"] * 4), pytest.raises(ValueError, match="4 samples, but a layer got an input of 6"):
        model(x)
    torch.testing.assert_close(set_adapter(model, "de")(x)[2:4], found[2:4])


def test_gradients_of_a_mixed_batch_reach_each_sample_s_adapter() -> None:
    model = two().train()
    with adapters_for(model, ["fr", "fr", "de", None]):
        model(IDS).logits.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name, rows in (("fr", IDS[:2]), ("de", IDS[2:3])):
        set_adapter(model, name)
        model(rows).logits.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_a_thousand_merged_swaps_leave_the_base_bit_for_bit() -> None:
    model = two().bfloat16()
    weights = {name: p for name, p in model.named_parameters() if ".lora." not in name}
    bits = {name: p.detach().clone() for name, p in weights.items()}
    for name in ["fr", "de"] * 500:
        unmerge(merge(model, name))
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, bits[name]) for name, p in weights.items())


def test_merging_folds_in_the_chosen_ones() -> None:
    model = two()
    adapted = alone(model, "de")
    torch.testing.assert_close(logits(merge(unmerge(model))), adapted, rtol=1e-4, atol=1e-5)
    for change in (
        lambda: set_adapter(model, "fr"),
        lambda: add_adapter(model, FR, "it"),
        lambda: delete_adapter(model, "fr"),
        lambda: adapters_for(model, ["fr"]).__enter__(),
    ):
        with pytest.raises(ValueError, match="unmerge first"):
            change()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    eject(model, merge=True)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert active_adapters(model) == ["de"]
    assert torch.equal(logits(model), adapted)


def test_deleting_adapters() -> None:
    model = tiny_llama().eval()
    before, base = toys.snapshot(model), logits(model)
    add_adapter(inject(model, FR, "fr"), DE, "de")
    moved(model)
    de = alone(model, "de")
    delete_adapter(set_adapter(model, "fr"), "fr")
    assert list(adapters(model)) == ["de"]
    assert torch.equal(logits(model), base)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(alone(model, "de"), de)
    delete_adapter(model, "de")
    toys.assert_same_tensors(toys.snapshot(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_modules_trained_in_full_belong_to_their_adapter(tmp_path: Path) -> None:
    base = logits(tiny_classifier().eval())
    configs = [LoraConfig(r=r, target_modules=["query"], modules_to_save=["classifier"]) for r in (2, 3)]
    model = two(tiny_classifier, *configs)
    out = {}
    for seed, name in enumerate(("fr", "de")):
        set_adapter(model, name)
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight)
        out[name] = logits(model)
    for name, expected in out.items():
        assert torch.equal(alone(model, name), expected)
    assert torch.equal(logits(set_adapter(model, None)), base)
    with pytest.raises(ValueError, match=r"'fr' and 'de' cannot be active together, since both set classifier\.bias"):
        set_adapter(model, ["fr", "de"])
    with pytest.raises(ValueError, match="'de' has parameters trained in full"):
        adapters_for(model, ["de"] * 4).__enter__()
    save_adapter(model, tmp_path, "de")  # while another one is at work
    set_adapter(model, "fr")
    other = load_adapter(inject(tiny_classifier().eval(), configs[0], "fr"), tmp_path, "de")
    assert active_adapters(other) == ["fr"]
    torch.testing.assert_close(alone(other, "de"), out["de"])
    eject(set_adapter(model, None))
    assert torch.equal(logits(model), base)


def test_dora_works_alone() -> None:
    model = two(fr=LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    fr, de = alone(model, "fr"), alone(model, "de")
    assert not torch.equal(fr, de)
    with pytest.raises(ValueError, match="cannot be active together"):
        set_adapter(model, ["de", "fr"])
    with pytest.raises(TargetError, match="use add_adapter"):
        inject(set_adapter(model, "fr"), DE, "it")
    assert torch.equal(alone(model, "fr"), fr)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_adapter(model, "nope"),
        lambda model: delete_adapter(model, "nope"),
        lambda model: merge(model, "nope"),
        lambda model: adapters_for(model, ["fr", "nope"]).__enter__(),
    ],
)
def test_unknown_names(change: Callable[[nn.Module], Any]) -> None:
    model = two()
    with pytest.raises(ValueError, match="no adapter 'nope'; it has 'fr', 'de'"):
        change(model)
    assert active_adapters(model) == ["fr"]


class Switching(toys.Toy):
    """Trains one adapter on even batches and the other on odd ones."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        set_adapter(self, ("even", "odd")[batch_idx % 2])
        return super().training_step(batch, batch_idx)


def test_two_adapters_trained_at_once_on_one_base(tmp_path: Path) -> None:
    def lora(name: str) -> LoRA:
        return LoRA(r=2, target_modules=["net.0", "net.4"], modules_to_save=None, adapter_name=name, merge=None)

    model = Switching(dropout=0.0)
    base = toys.snapshot(model)
    trainer = toys.trainer(tmp_path, [lora("even"), lora("odd")], max_epochs=1)
    trainer.fit(model, toys.loader())
    names = list(torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"])
    assert len(names) == 8
    for parity, name in enumerate(("even", "odd")):
        single = toys.Toy(dropout=0.0)
        half = torch.utils.data.Subset(toys.dataset(), [i for i in range(toys.ROWS) if (i // 8) % 2 == parity])
        toys.trainer(tmp_path / name, lora(name), max_epochs=1).fit(
            single, torch.utils.data.DataLoader(half, batch_size=8)
        )
        torch.testing.assert_close(toys.outputs(set_adapter(model, name)), toys.outputs(single))
    toys.assert_same_tensors(toys.snapshot(eject(model)), base)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ],
)
def test_base_is_there_bit_for_bit_and_the_adapter_comes_back(settings: dict) -> None:
    ids = torch.arange(8)[None]
    model = word_model(attention_bias=True).eval()
    with torch.no_grad():
        base = model(ids).logits
        inject(model, LoraConfig(r=2, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        adapted = model(ids).logits
        assert not torch.equal(adapted, base)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with disabled(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, adapted)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_the_adapter_comes_back_after_an_error() -> None:
    model = inject(word_model(), LoraConfig(r=2))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), disabled(model):
        raise RuntimeError("stop")
    assert kinds == [type(module) for module in model.modules()]


def test_nothing_to_switch_off() -> None:
    with pytest.raises(ValueError, match="no adapter to switch off"), disabled(word_model()):
        pass
    model = merge(inject(word_model(), LoraConfig(r=2)))
    with pytest.raises(ValueError, match="unmerge first"), disabled(model):
        pass


def test_gradients_flow_past_it() -> None:
    """As in preference tuning: the adapted model's graph is made, the base runs, then the backward pass."""
    ids = torch.arange(8)[None]
    gradients = []
    for interrupted in (False, True):
        model = inject(word_model(), LoraConfig(r=2, init_lora_weights=False, seed=1))
        loss = model(ids, labels=ids).loss
        if interrupted:
            with torch.no_grad(), disabled(model):
                model(ids)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients))
