"""Merged weights are made by blocks of rows, and are what they are when made as a whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layers import make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoraConfig, inject, merge
from lightning_lora.layers import LoraLayer, folding
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.folding import is_finite
from lightning_lora.layers.linear import LinearAdapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_finite(dtype: torch.dtype) -> None:
    tensor = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = tensor.clone()
        broken[3, 2] = bad
        assert not is_finite(broken)


class Stack(nn.Module):
    """Matrices in one parameter, or a single one."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.stacked.mT


BASES: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda rows, columns: make("linear", columns, rows),
    "conv1d": lambda rows, columns: make("conv1d", rows, columns),
    "embedding": nn.Embedding,
    "convolution": lambda rows, columns: nn.Conv2d(columns, rows, 1),
    "matrix": Stack,
    "stack": lambda rows, columns: Stack(max(1, rows // 32), 32, columns),
    "transposed stack": lambda rows, columns: _transposed(Stack(max(1, rows // 32), columns, 32)),
}


def _transposed(stack: nn.Module) -> nn.Module:
    stack.is_transposed = True  # type: ignore[assignment]
    return stack


def in_eighths(model: nn.Module) -> None:
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *(getattr(module, name, None) for name in ("vera_A", "vera_B"))]
        for tensor in tensors:
            if tensor is not None:
                tensor.data = torch.randint(1, 17, tensor.shape).to(tensor.dtype) / 8


def adapted(base: nn.Module, dtype: torch.dtype, **settings: Any) -> LoraLayer:
    """The layer with an adapter, of values in steps of an eighth: in float32, no order of adding up rounds them."""
    where: Any = {"target_modules": ["0"]}
    if isinstance(base, Stack):
        where = {"target_modules": [], "target_parameters": ["0.stacked"]}
    model = inject(nn.Sequential(base.to(dtype)), LoraConfig(**where, **settings))
    in_eighths(model)
    layer = model[0]
    assert isinstance(layer, LoraLayer)
    return layer


def as_a_whole(layer: LoraLayer) -> dict[str, Tensor]:
    """The merged weights by each adapter's fold of whole weights, rounded once."""
    wide = {name: weight.to(torch.promote_types(weight.dtype, torch.float32)) for name, weight in _weights(layer)}
    return {name: layer.folded(name, wide[name]).to(weight.dtype) for name, weight in _weights(layer)}


def _weights(layer: LoraLayer) -> list[tuple[str, Tensor]]:
    return list(layer.adapted_parameters().items())


@torch.no_grad()
@given(
    kind=st.sampled_from(sorted(BASES)),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 63, 64, 128, 300, 577]),
    columns=st.sampled_from([3, 50, 64, 256]),
    r=st.sampled_from([1, 2, 8]),
    numbers=st.sampled_from([1, 1 << 14, folding._NUMBERS]),
    use_vera=st.booleans(),
    by_columns=st.booleans(),
)
def test_blocks_give_the_bits_of_the_whole(
    kind: str, dtype: torch.dtype, rows: int, columns: int, r: int, numbers: int, use_vera: bool, by_columns: bool
) -> None:
    use_vera = use_vera and kind in ("linear", "conv1d")
    layer = adapted(BASES[kind](rows, columns), dtype, r=r, lora_alpha=r / 2, use_vera=use_vera)
    if by_columns:  # as they lie in memory
        for _, weight in _weights(layer):
            weight.data = weight.data.mT.contiguous().mT
    whole = as_a_whole(layer)
    assert not any(torch.equal(whole[name], weight) for name, weight in _weights(layer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "_NUMBERS", numbers)
        merged = layer.merged_weights()
    strides = {name: weight.stride() for name, weight in _weights(layer)}
    for name, weight in whole.items():
        assert (merged[name].dtype, merged[name].stride()) == (dtype, strides[name])
        assert torch.equal(merged[name], weight)


@pytest.mark.parametrize("use_dora", [False, True])
def test_two_adapters_or_none(use_dora: bool) -> None:
    layer = adapted(nn.Linear(64, 300), torch.bfloat16, r=4, use_dora=use_dora)
    layer.active = ()
    assert torch.equal(layer.merged_weights()["weight"], layer.weight)
    assert layer.merged_weights()["weight"].data_ptr() != layer.weight.data_ptr()
    model = nn.Sequential(nn.Linear(64, 300).bfloat16())
    for name in ("one", "other"):
        inject(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), adapter_name=name)
    both: Any = model[0]
    in_eighths(both)
    both.active = ("one", "other")
    with torch.no_grad():
        assert torch.equal(both.merged_weights()["weight"], as_a_whole(both)["weight"])


class Largest(TorchDispatchMode):
    """How many numbers the largest new tensor in float32 has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("kind", sorted({*BASES} - {"convolution"}))
def test_no_weight_is_there_in_float32_as_a_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "_NUMBERS", 1 << 12)
    layer = adapted(BASES[kind](1024, 64), torch.bfloat16, r=2)
    with Largest() as seen:
        layer.merged_weights()
    assert 0 < seen.numbers <= 3 * (1 << 12) < 1024 * 64


class Doubled(LinearAdapter):
    """Folds in another way than the class that it is made of."""

    def fold(self, weight: Tensor) -> Tensor:
        return 2 * super().fold(weight)


def test_an_adapter_with_a_fold_of_its_own_folds_by_that() -> None:
    layer = adapted(nn.Linear(64, 300), torch.bfloat16, r=2)
    adapter = layer.lora["default"]
    adapter.__class__ = Doubled
    assert Doubled.row_fold is Adapter.row_fold is not LinearAdapter.row_fold
    with torch.no_grad():
        expected = (2 * adapter.scaling * adapter.lora_B @ adapter.lora_A + 2 * layer.weight.float()).bfloat16()  # type: ignore
    torch.testing.assert_close(layer.merged_weights()["weight"], expected)


@given(
    dtype=st.sampled_from(DTYPES),
    place=st.tuples(st.integers(0, 299), st.integers(0, 63)),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)
def test_a_number_that_is_not_finite_is_found_in_any_block(
    dtype: torch.dtype, place: tuple[int, int], bad: float
) -> None:
    layer = adapted(nn.Linear(64, 300), dtype, r=2)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "_NUMBERS", 1)
        merge(nn.Sequential(layer))
        before = layer.weight.detach().clone()
        layer.unmerge()
        layer.weight[place] = bad
        with pytest.raises(ValueError, match="NaN or an infinity"):
            layer.merged_weights()
        layer.weight[place] = torch.finfo(dtype).max  # which alone makes no sum infinite
        layer.lora["default"].lora_B.zero_()  # type: ignore[operator,union-attr]
        layer.merged_weights()
    assert before.isfinite().all()
