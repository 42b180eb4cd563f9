"""LoRA on recurrent layers and cells, by their names and by "all-linear+recurrent"."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from torch import Tensor, nn

from lightning_lora import LoraConfig, eject, inject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.model.targets import find_targets

KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {"num_layers": 2, "batch_first": True}),
    "LSTM both ways": (nn.LSTM, {"bidirectional": True, "proj_size": 3}),
    "GRU": (nn.GRU, {"bias": False}),
    "RNN": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    "LSTMCell": (nn.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, {}),
}


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        cls, settings = KINDS[kind]
        self.body = cls(4, 6, **settings)
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.head(out[0] if isinstance(out, tuple) else out)


def batch(kind: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4) if kind.endswith("Cell") else torch.randn(3, 5, 4)


def build(kind: str) -> Model:
    model = Model(kind)
    model(batch(kind))  # by which the head gets its shape
    return model


def reference(model: Model) -> Model:
    """The same model on ``W + scaling * B A``, computed here."""
    adapters = {a.parameter: a for a in model.body.lora["default"].values()}  # type: ignore[union-attr, operator]
    weights = {
        name: parameter.detach() + 1.5 * adapters[name].lora_B.detach() @ adapters[name].lora_A.detach()
        for name, parameter in model.body.named_parameters(recurse=False)
        if name in adapters
    }
    assert all(name.startswith("weight_") for name in weights)
    assert len(weights) == sum("weight_" in name for name, _ in model.body.named_parameters(recurse=False))
    plain = copy.deepcopy(model)
    eject(plain)
    for name, weight in weights.items():
        plain.body.get_parameter(name).data.copy_(weight)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_merging(kind: str) -> None:
    model, x = build(kind), batch(kind)
    before, base = model(x), toys.snapshot(model)
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["body"]))
    assert torch.equal(model(x), before)
    toys.randomize(model)
    plain = reference(model)
    adapted, expected = model(x), plain(x)
    torch.testing.assert_close(adapted, expected)
    assert not torch.allclose(adapted, before)
    adapted.square().sum().backward()
    expected.square().sum().backward()
    for adapter in model.body.lora["default"].values():  # type: ignore[union-attr, operator]
        gradient = 1.5 * plain.body.get_parameter(adapter.parameter).grad
        torch.testing.assert_close(adapter.lora_A.grad, adapter.lora_B.T @ gradient)
        torch.testing.assert_close(adapter.lora_B.grad, gradient @ adapter.lora_A.T)
    merge(model)
    torch.testing.assert_close(model(x), adapted)
    unmerge(model)
    assert torch.equal(model(x), adapted)
    toys.assert_same_tensors(toys.base_of(model, base), base)


def test_words_for_groups_of_layers() -> None:
    model = nn.ModuleDict(
        {"rnn": nn.LSTM(2, 3), "cell": nn.GRUCell(2, 3), "conv": nn.Conv2d(4, 4, 3), "fc": nn.Linear(2, 2)}
    )
    found = {
        word: list(find_targets(model, LoraConfig(r=2, target_modules=word)))
        for word in ("all-linear", "all-linear+conv", "all-linear+recurrent", "all-linear+recurrent+conv")
    }
    assert list(found.values()) == [["fc"], ["conv", "fc"], ["rnn", "cell", "fc"], ["rnn", "cell", "conv", "fc"]]


def test_most_of_a_model_is_not_left_out_in_silence() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 16), "fc": nn.Linear(2, 2)})
    with pytest.warns(UserWarning, match=r"100% are in recurrent layers.*'all-linear\+recurrent' adapts them"):
        find_targets(model, LoraConfig())


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_peft_reads_it(kind: str, tmp_path: Path) -> None:
    model, x = build(kind), batch(kind)
    inject(model, LoraConfig(r=2, target_modules="all-linear+recurrent"))
    toys.randomize(model)
    expected = model(x)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(build(kind), tmp_path)(x), expected)
    theirs = peft.PeftModel.from_pretrained(build(kind), str(tmp_path))
    torch.testing.assert_close(theirs(x), expected)
