"""What every adapted layer does, whatever its kind."""

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.layers import move
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_lora import LoraConfig, disabled, inject, merge, unmerge

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
