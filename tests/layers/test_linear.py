"""Adapted layers against an explicit float64 ``W + scaling * B A``, made here and not by the package."""

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from helpers import toys
from helpers.layers import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoraConfig,
    adapter_state_dict,
    add_adapter,
    eject,
    inject,
    load_adapter_state_dict,
    merge,
    set_adapter,
    unmerge,
)

KINDS = ("linear", "linear without bias", "conv1d")


def adapted(layer: nn.Module, r: int, **config: object) -> nn.Module:
    """The layer with a trained-looking adapter: B is not zero."""
    inject(layer, LoraConfig(r=r, lora_alpha=3, **config))  # type: ignore[arg-type]
    adapter = layer.lora["default"]  # type: ignore[index]
    nn.init.normal_(adapter.lora_B)
    return layer


def reference(layer: nn.Module, x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output in float64, and the A, B and x that autograd can be asked about."""
    adapter = layer.lora["default"]  # type: ignore[index]
    A, B = (p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    x = x.detach().double().requires_grad_()
    weight = layer.weight.detach().double()  # type: ignore[union-attr,operator]
    if isinstance(layer, Conv1D):
        weight = weight.T
    weight = weight + (3 / r) * (B @ A)
    bias = getattr(layer, "bias", None)
    return nn.functional.linear(x, weight, None if bias is None else bias.detach().double()), A, B, x


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    in_features=st.integers(1, 12),
    out_features=st.integers(1, 12),
    r=st.integers(1, 14),
    leading=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 1000),
)
def test_forward_and_gradients_equal_the_reference(
    kind: str, in_features: int, out_features: int, r: int, leading: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    layer = adapted(make(kind, in_features, out_features), r)
    x = torch.randn(*leading, in_features, requires_grad=True)
    out = layer(x)
    expected, A, B, x64 = reference(layer, x, r)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    adapter = layer.lora["default"]  # type: ignore[index]
    for found, wanted in ((adapter.lora_A, A), (adapter.lora_B, B), (x, x64)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)
    assert layer.weight.grad is None  # type: ignore[union-attr]


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    r=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.3]),
    use_dora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_state_dict_round_trip_merge_and_unmerge(
    kind: str, dtype: torch.dtype, r: int, dropout: float, use_dora: bool, seed: int
) -> None:
    """The adapter's tensors alone make another base layer the same, and merging leaves no trace after unmerging."""
    torch.manual_seed(seed)
    base = make(kind, 6, 5, dtype)
    twin, x = copy.deepcopy(base), torch.randn(3, 6, dtype=dtype)
    layer = adapted(base, r, lora_dropout=dropout, use_dora=use_dora).eval()
    other = inject(twin, LoraConfig(r=r, lora_alpha=3, lora_dropout=dropout, use_dora=use_dora, seed=1)).eval()
    load_adapter_state_dict(other, copy.deepcopy(adapter_state_dict(layer)))
    expected, bits = layer(x), layer.weight.detach().clone()  # type: ignore[union-attr,operator]
    assert torch.equal(other(x), expected)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(merge(other)(x), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(unmerge(other)(x), expected)
    assert torch.equal(other.weight, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fresh_adapter_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = make(kind, 24, 40, dtype)
    x = torch.randn(3, 5, 24, dtype=dtype)
    before = layer(x)
    inject(layer, LoraConfig(r=4, lora_dropout=0.5))
    assert torch.equal(layer(x), before)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_equals_adapted_and_unmerge_is_exact(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = make(kind, 24, 40, dtype)
    weight = layer.weight  # type: ignore[union-attr]
    bits = weight.detach().clone()
    adapted(layer, 4)
    exact = reference(layer, torch.eye(24), 4)[0] - reference(layer, torch.zeros(1, 24), 4)[0]
    merge(layer)
    merged = layer.weight.detach().double()  # type: ignore[union-attr,operator]
    merged = merged if kind == "conv1d" else merged.T
    # Rounded once, from the exact value to the nearest of this dtype.
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((merged - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-6).all()
    assert layer.weight is weight
    for _ in range(10):
        assert merge(unmerge(layer)) is layer
    unmerge(layer)
    assert layer.weight is weight
    assert torch.equal(weight, bits)


def test_complex_weights_are_merged_and_looked_at() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6, dtype=torch.complex64)
    layer = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=".*"))
    toys.randomize(layer)
    A, B = (layer.state_dict()[f"lora.default.lora_{m}"] for m in "AB")
    x = torch.randn(3, 8, dtype=torch.complex64)
    expected = nn.functional.linear(x, base.weight + 8 * B @ A, base.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(merge(layer)(x), expected)
    unmerge(layer).lora["default"].lora_B.data[0, 0] = complex(0, torch.inf)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        merge(layer)


def test_merging_twice_changes_nothing() -> None:
    layer = adapted(nn.Linear(6, 5), 2)
    once = merge(layer).weight
    assert merge(layer).weight is once
    assert layer(torch.ones(6)).equal(nn.functional.linear(torch.ones(6), once, layer.bias))


def test_a_merge_that_overflows_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    inject(model, LoraConfig(r=2))
    with torch.no_grad():
        model[1].lora["default"].lora_B.fill_(1e9)
    weights = [layer.weight for layer in model]
    for fold in (merge, lambda m: eject(m, merge=True)):
        with pytest.raises(ValueError, match="NaN or an infinity"):
            fold(model)
        assert [layer.weight for layer in model] == weights
        assert "lora" in dict(model[0].named_children())


def test_function_transforms() -> None:
    """Per-sample gradients by torch.func, as users of differential privacy or of curvature take them."""
    layer = adapted(nn.Linear(4, 3), 2)
    adapter = layer.lora["default"]  # type: ignore[index]
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in layer.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {**frozen, **parameters}, (x,)).square().sum()

    x = torch.randn(6, 4)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    layer(x).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(each[f"lora.default.{name}"].sum(0), parameter.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = nn.Sequential(adapted(nn.Linear(4, 4), 2), nn.ReLU(), adapted(nn.Linear(4, 4), 2))
    x = torch.randn(5, 4, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_half_precision_bases_get_float32_adapters_and_inputs_are_not_cast() -> None:
    layer = adapted(nn.Linear(8, 8).bfloat16(), 2)
    adapter = layer.lora["default"]  # type: ignore[index]
    assert adapter.lora_A.dtype == torch.float32
    saved: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = layer(torch.randn(100, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert not [1 for dtype, numel in saved if dtype == torch.float32 and numel >= 800]
    out.sum().backward()
    assert adapter.lora_A.grad.dtype == torch.float32


def test_autocast() -> None:
    layer = adapted(nn.Linear(16, 16), 4)
    x = torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(layer, x, 4)[0], rtol=0.05, atol=0.1)


def test_autocast_leaves_float64_alone() -> None:
    layer = adapted(nn.Linear(4, 4).double(), 2)
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), reference(layer, x, 2)[0])


def test_dropout_acts_in_training_alone() -> None:
    layer = adapted(nn.Linear(32, 8), 4, lora_dropout=0.5)
    x = torch.randn(4, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).double(), reference(layer, x, 4)[0], rtol=1e-5, atol=1e-5)


def test_no_temporary_of_the_outputs_size_is_kept() -> None:
    """What autograd holds for the adapter is the input, which the base shares or drops, and the rank-wide product."""
    layer = adapted(nn.Linear(64, 512), 4)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(100, 64, requires_grad=True))
    assert max(sizes) <= 64 * 512  # the weight itself, for the gradient of x
    assert 100 * 512 not in sizes


def test_copies_and_pickles() -> None:
    layer = adapted(nn.Linear(4, 4), 2)
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert type(twin) is type(layer)
        assert type(eject(twin)) is nn.Linear
    assert "lora" in dict(layer.named_children())


def test_compiles_in_one_graph() -> None:
    layer = adapted(nn.Linear(4, 4), 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(compiled(x), layer(x))


class Channels(nn.Module):
    """A linear layer of another class, as torch_geometric's."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.scale = 4, 6, scale
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.linear(x, self.weight, self.bias)


def test_a_linear_layer_of_another_class_has_adapters_as_any() -> None:
    model, x = nn.Sequential(Channels(), nn.Linear(6, 2)), torch.randn(3, 4)
    inject(model, LoraConfig(r=2))
    add_adapter(model, LoraConfig(r=3), "second")
    for name in ("default", "second"):
        for layer in model:
            assert name in layer.lora
            nn.init.normal_(layer.lora[name].lora_B)
    set_adapter(model, ["default", "second"])
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected)
    assert type(eject(model)[0]) is Channels


def test_a_layer_that_computes_something_else_is_none() -> None:
    model = inject(nn.Sequential(Channels(scale=2.0), nn.Linear(6, 2)), LoraConfig(r=2))
    assert type(model[0]) is Channels and hasattr(model[1], "lora")
