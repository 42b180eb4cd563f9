"""LoRA on convolutions against an explicit float64 ``W + scaling * B A``, and beside PEFT."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.toys import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from lightning_lora import (
    CheckpointError,
    LoraConfig,
    TargetError,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_lora.model.targets import find_targets

ITSELF = ".*"  # the layer that is the whole model
KINDS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def adapted(layer: Any, r: int, **config: Any) -> Any:
    """The layer with a trained-looking adapter: B is not zero."""
    inject(layer, LoraConfig(r=r, lora_alpha=3, target_modules=ITSELF, **config))
    nn.init.normal_(layer.lora["default"].lora_B)
    return layer


def reference(layer: Any, x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of a plain layer in float64, and the A, B and x that autograd can be asked about."""
    adapter = layer.lora["default"]
    A, B = (p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    x = x.detach().double().requires_grad_()
    # Each group of outputs sees its own group of A's rows.
    blocks = zip(A.chunk(layer.groups), B.chunk(layer.groups))
    delta = torch.cat(
        [sum(torch.einsum("o,i...->oi...", b[:, k].flatten(), a[k]) for k in range(len(a))) for a, b in blocks]
    )
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    kind = KINDS[len(layer.kernel_size)]
    plain = kind(**{name: getattr(layer, name) for name in names}, bias=False, dtype=torch.float64)
    del plain.weight
    plain.weight = layer.weight.detach().double() + (3 / r) * delta
    bias = 0 if layer.bias is None else layer.bias.detach().double().view(-1, *[1] * len(layer.kernel_size))
    return plain(x) + bias, A, B, x


@st.composite
def layers_and_inputs(draw: Any) -> tuple[Any, Tensor, int]:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    stride = draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    padding = draw(st.sampled_from([each(0, 2), "valid", "same" if set(stride) == {1} else "valid"]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.integers(1, 3))
    channels_in, channels_out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = KINDS[dims](
        channels_in, channels_out, each(1, 3), stride, padding, each(1, 2), groups, draw(st.booleans()), mode
    )
    leading = (channels_in,) if draw(st.booleans()) else (draw(st.integers(1, 3)), channels_in)
    return layer, torch.randn(*leading, *each(5, 7), requires_grad=True), groups * draw(st.integers(1, 4))


@settings(max_examples=100)
@given(case=layers_and_inputs())
def test_forward_gradients_and_merge_equal_the_reference(case: tuple[Any, Tensor, int]) -> None:
    layer, x, r = case
    adapted(layer, r)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of padding="same" with an even kernel
        out = layer(x)
        expected, A, B, x64 = reference(layer, x, r)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    adapter = layer.lora["default"]
    for found, wanted in ((adapter.lora_A, A), (adapter.lora_B, B), (x, x64)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)
    assert layer.weight.grad is None
    weight, bits = layer.weight, layer.weight.detach().clone()
    torch.testing.assert_close(merge(layer)(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert unmerge(layer).weight is weight
    assert torch.equal(weight, bits)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(dims: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = KINDS[dims](6, 5, 3, padding=1, dtype=dtype)
    x = torch.randn(2, 6, *[6] * dims, dtype=dtype)
    before = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        before_autocast = layer(x)
    inject(layer, LoraConfig(r=4, lora_dropout=0.5, target_modules=ITSELF))
    assert torch.equal(layer(x), before)
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), before_autocast)


def test_merging_rounds_once() -> None:
    torch.manual_seed(0)
    layer = adapted(nn.Conv2d(4, 5, 3, dtype=torch.bfloat16), 2)
    adapter = layer.lora["default"]
    delta = 1.5 * torch.einsum("or,rixy->oixy", adapter.lora_B[:, :, 0, 0].double(), adapter.lora_A.double())
    exact = layer.weight.double() + delta
    assert ((merge(layer).weight.double() - exact).abs() <= 0.51 * 2**-7 * exact.abs() + 1e-6).all()


def test_initial_values_know_the_fan_in() -> None:
    layer: Any = inject(nn.Conv2d(8, 4, 5), LoraConfig(r=64, target_modules=ITSELF))
    lora_A = layer.lora["default"].lora_A
    bound = (8 * 25) ** -0.5  # of nn.Linear with as many inputs
    assert 0.98 * bound < lora_A.abs().max() <= bound
    gaussian: Any = inject(nn.Conv2d(8, 4, 5), LoraConfig(r=64, target_modules=ITSELF, init_lora_weights="gaussian"))
    assert abs(gaussian.lora["default"].lora_A.std() * 64 - 1) < 0.05


def test_dropout_acts_in_training_alone_and_copies_work() -> None:
    layer = adapted(nn.Conv1d(8, 4, 3), 2, lora_dropout=0.5)
    x = torch.randn(2, 8, 9)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).double(), reference(layer, x, 2)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    assert type(eject(layer)) is nn.Conv1d


class Net(nn.Module):
    """Every kind of convolution that PEFT gets right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv2d = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.conv3d = nn.Conv3d(1, 4, (3, 2, 2), padding=(1, 0, 1))
        self.conv1d = nn.Conv1d(4, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(self.pointwise(self.conv2d(x).relu()).unsqueeze(1))
        return self.conv1d(x.relu().flatten(2))


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3)
    )


def convnext() -> ConvNextForImageClassification:
    torch.manual_seed(0)
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Any, list[str]]] = {
    "toy": (Net, ["conv1d", "conv2d", "pointwise", "conv3d"]),
    "resnet": (resnet, ["convolution"]),
    "convnext": (convnext, ["patch_embeddings", "downsampling_layer.1", "pwconv1"]),
}


def logits(model: nn.Module) -> Tensor:
    out = model(PIXELS)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", CASES)
def test_beside_peft(name: str, tmp_path: Path) -> None:
    make, targets = CASES[name]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    model: Any = inject(make(), LoraConfig(**settings, modules_to_save=None)).eval()
    randomize(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(make().eval()), logits(model), atol=1e-3)
    for one in (model, theirs):
        logits(one).square().mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(mine) == len(gradients) > 0
    for key, gradient in mine.items():
        there = "base_model.model." + key.replace(".lora.default.lora_A", ".lora_A.default.weight").replace(
            ".lora.default.lora_B", ".lora_B.default.weight"
        )
        torch.testing.assert_close(gradient, gradients[there], rtol=1e-4, atol=1e-6)
    merged = merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)

    other: Any = peft.get_peft_model(make(), peft.LoraConfig(**settings)).eval()
    randomize(other)
    other.save_pretrained(tmp_path / "theirs")
    opened = load_adapter(make(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(opened), logits(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 6, 6)),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), torch.randn(2, 4, 6, 6)),
        (nn.Conv1d(4, 4, 3, padding=2, padding_mode="reflect"), torch.randn(2, 4, 6)),
    ],
)
def test_padding_modes_and_dilation_are_as_peft_merges_and_not_as_it_runs(
    layer: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    """PEFT 0.21.2 pads with zeros and does not dilate until the adapter is merged."""
    base = nn.ModuleList([layer])
    plain = copy.deepcopy(base)
    model = inject(copy.deepcopy(base), LoraConfig(r=4, target_modules=["0"]))
    randomize(model)
    with pytest.warns(UserWarning, match="PEFT 0.21 leaves out dilation and padding modes .* something else in '0'"):
        save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    there = theirs.base_model.model[0]
    assert not torch.allclose(there(x), model[0](x), atol=1e-2)
    there.merge()
    torch.testing.assert_close(there(x), model[0](x), rtol=1e-4, atol=1e-5)
    again = load_adapter(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(again[0](x), model[0](x))
    there.unmerge()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=rf"padding_mode='{layer.padding_mode}'.*PEFT leaves out until it merges"):
        load_adapter(plain, tmp_path / "theirs")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding_mode="circular"),
        nn.Conv1d(4, 4, 3, padding="valid", padding_mode="reflect"),
        nn.Conv1d(4, 4, 1, dilation=2),
    ],
)
def test_what_peft_runs_rightly_is_exported_in_silence(layer: nn.Module, tmp_path: Path) -> None:
    model = inject(nn.ModuleList([copy.deepcopy(layer)]), LoraConfig(r=4, target_modules=["0"]))
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    x = torch.randn(2, 4, *[6] * (layer.weight.dim() - 2))
    theirs = peft.PeftModel.from_pretrained(nn.ModuleList([layer]), tmp_path)
    torch.testing.assert_close(theirs.base_model.model[0](x), model[0](x), rtol=1e-4, atol=1e-5)


def test_all_linear_leaves_convolutions_alone() -> None:
    found = find_targets(convnext(), LoraConfig(modules_to_save=None))
    assert {name.rsplit(".", 1)[-1] for name in found} == {"pwconv1", "pwconv2", "classifier"}


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Conv2d(6, 6, 3, groups=3), "groups=3, by which the rank must be divisible, and that is 8"),
        (Standardized(4, 4, 3), "forward of its own"),
        (parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "parametrization"),
        (parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrization"),
    ],
)
def test_what_cannot_be_merged_is_refused(layer: nn.Module, match: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": layer})
    before = toys.snapshot(model)
    with pytest.raises(TargetError, match=f"'second'.*cannot be adapted: .*{match}.*Nothing was changed"):
        inject(model, LoraConfig(target_modules=["first", "second"]))
    toys.assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_convolutions_do_not_have() -> None:
    with pytest.raises(TargetError, match="'orthogonal' is not for this kind of layer"):
        inject(nn.Conv2d(4, 3, 1), LoraConfig(r=2, target_modules=ITSELF, init_lora_weights="orthogonal"))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_beside_peft(groups: int, tmp_path: Path) -> None:
    """Ours opens there; theirs, which looks at all channels, is refused unless it happens not to."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 4, 3, groups=groups))

    torch.manual_seed(1)
    x = torch.randn(2, 8, 6, 6)
    ours = inject(make(), LoraConfig(r=4, lora_alpha=3, target_modules=["0"]))
    randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(opened(x), ours(x))
    torch.testing.assert_close(load_adapter(make(), tmp_path / "ours")(x), ours(x))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=3, target_modules=["0"]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    with pytest.raises(CheckpointError, match="looks at all input channels"):
        load_adapter(model, tmp_path / "theirs")
    assert type(model[0]) is nn.Conv2d
