"""The base for a moment, out of the adapted model."""

import pytest
import torch
from texts import word_model

import lightning_lora
from lightning_lora import LoraConfig, inject, merge
from lightning_lora.model.multi_adapter import disabled


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
            with torch.no_grad(), lightning_lora.model.multi_adapter.disabled(model):
                model(ids)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients))
