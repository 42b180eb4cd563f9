"""A layer keeps its identity in the class that it takes on, and gets its own back."""

import inspect
import warnings

import pytest
import torch
from helpers.layers import KINDS, move, run
from torch import Tensor, nn

from lightning_lora import LoraConfig, eject, inject


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_by_name(kind: str) -> None:
    """A call may name the layer's input as the layer's own class does."""
    make, x = KINDS[kind]
    model = inject(nn.Sequential(make()), LoraConfig(r=2, target_modules=["0"]))
    move(model)
    expected = run(model, x)
    names = [*inspect.signature(type(make()).forward).parameters][1:4]
    given = dict(zip(names, (x, x, x))) if kind == "attention" else {names[0]: x}
    out = model[0](**given)
    torch.testing.assert_close(out[0] if kind == "attention" else out, expected, rtol=0, atol=0)
    with pytest.raises(TypeError):
        model[0]()


def test_inputs_that_have_names_alone() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, *, x: Tensor, factor: float = 1.0) -> Tensor:
            return factor * x @ self.weight

    model, x = nn.Sequential(Named()), torch.randn(2, 4)
    base = model[0](factor=2.0, x=x)
    inject(model, LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]))
    torch.testing.assert_close(model[0](factor=2.0, x=x), base, rtol=0, atol=0)


def test_subclasses_hooks_and_references_survive() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = Doubled(4, 4)
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    model = nn.ModuleDict({"a": layer, "b": layer})
    x = torch.randn(2, 4)
    base = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one layer under two names is not a tie
        inject(model, LoraConfig(r=2, lora_alpha=3))
    assert isinstance(layer, Doubled)
    assert torch.equal(layer(x), base)
    adapter = layer.lora["default"]["weight"]
    nn.init.normal_(adapter.lora_B)
    torch.testing.assert_close(model["b"](x), base + 2 * 1.5 * x @ adapter.lora_A.T @ adapter.lora_B.T)
    assert calls == ["hook"] * 3
    eject(model)
    assert type(layer) is Doubled
    assert torch.equal(layer(x), base)
