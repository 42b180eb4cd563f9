"""What every adapted layer does, whatever its kind."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.layers import KINDS, move, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_lora import LoraConfig, disabled, eject, inject, merge, unmerge
from lightning_lora.layers.base import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_finite(dtype: torch.dtype) -> None:
    tensor = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = tensor.clone()
        broken[3, 2] = bad
        assert not is_finite(broken)


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


FUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...], Callable[..., nn.Module]]] = {
    "linear": (lambda: nn.Linear(4, 5), lambda: nn.BatchNorm1d(5), (3, 4), fuse_linear_bn_eval),
    "conv": (lambda: nn.Conv2d(3, 5, 2), lambda: nn.BatchNorm2d(5), (2, 3, 4, 4), fuse_conv_bn_eval),
    "without a bias": (lambda: nn.Conv1d(3, 5, 2, bias=False), lambda: nn.BatchNorm1d(5), (2, 3, 4), fuse_conv_bn_eval),
}


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(sorted(FUSED)), use_dora=st.booleans(), seed=st.integers(0, 2**16))
def test_a_normalization_is_fused_into_a_merged_layer_and_no_other(kind: str, use_dora: bool, seed: int) -> None:
    make, make_norm, shape, fuse = FUSED[kind]
    torch.manual_seed(seed)
    layer, norm = make(), make_norm()
    nn.init.uniform_(norm.running_var, 0.2, 3)  # type: ignore[arg-type]
    model = inject(nn.Sequential(layer, norm).eval(), LoraConfig(r=2, target_modules=["0"], use_dora=use_dora))
    move(model)
    x = torch.randn(shape)
    expected = model(x)
    with pytest.warns(UserWarning, match="replaced by another one while its adapter is at work.*merge first"):
        fuse(layer, norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        merge(model)
        torch.testing.assert_close(fuse(layer, norm)(x), expected)
        unmerge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_weights_that_are_meant_to_be_there_are_no_replacement() -> None:
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    move(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
        model[0].weight = nn.Parameter(model[0].weight.clone())
        model[0].weight = nn.Parameter(model[0].weight.half(), requires_grad=False)
        merge(model)
        unmerge(model)
        with disabled(model):
            model[1].weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.warns(UserWarning, match="replaced by another one"):
        model[1].weight = nn.Parameter(torch.ones(4, 4))
