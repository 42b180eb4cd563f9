"""Whatever autograd can do with a base layer it can do with the adapted one, as a float64 reference of W + sBA says."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from helpers.layers import make
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoraConfig, inject
from lightning_lora.layers import functional
from lightning_lora.layers.functional import low_rank_linear

IN, OUT, R = 6, 4, 2
SCALING = 1.5
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: make("conv1d", IN, OUT),
    "embedding": lambda: nn.Embedding(IN, OUT),
    "convolution": lambda: nn.Conv1d(IN, OUT, 3, padding=1),
    "convolution without bias": lambda: nn.Conv2d(IN, OUT, (1, 2), bias=False),
}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA-FA": {"freeze_A": True},
    "DoRA": {"use_dora": True},
    "VeRA": {"use_vera": True},
}
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d}
Parameters = dict[str, Tensor]


def adapted(kind: str, method: str = "LoRA", dtype: torch.dtype = torch.float64, r: int = R) -> nn.Module:
    """A layer with an adapter that changes it."""
    layer = LAYERS[kind]().to(dtype)
    inject(layer, LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=".*", **METHODS[method]))
    for name, parameter in layer.named_parameters():
        if name.startswith("lora."):
            nn.init.normal_(parameter, std=0.5)
    return layer


def reference(layer: nn.Module, trained: Parameters, x: Tensor) -> Tensor:
    """The layer with the weight that it stands for, made here and not by the package; in the dtype of the tensors."""
    adapter: Any = layer.lora["default"]  # type: ignore[index]
    dtype = next(iter(trained.values())).dtype
    tensors = {name: tensor.detach().to(dtype) for name, tensor in layer.named_parameters()} | trained
    own = {name.removeprefix("lora.default."): tensor for name, tensor in tensors.items() if "lora." in name}
    weight, bias = tensors["weight"], tensors.get("bias")
    is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
    rows = weight.flatten(1) if is_convolution or isinstance(layer, nn.Linear) else weight.T
    if "vera_lambda_b" in own:
        A, B = (tensor.to(dtype) for tensor in adapter.sliced())
        rows = rows + own["vera_lambda_b"].diag() @ B @ own["vera_lambda_d"].diag() @ A
    else:
        rows = rows + SCALING * own["lora_B"].flatten(1) @ own["lora_A"].flatten(1)
    if "lora_magnitude_vector" in own:  # whose norm is held constant
        rows = own["lora_magnitude_vector"].view(-1, 1) * rows / rows.detach().norm(dim=1, keepdim=True)
    if is_convolution:
        return CONVOLUTIONS[weight.dim()](x, rows.view_as(weight), bias, padding=layer.padding)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, rows.T)
    return F.linear(x, rows, bias)


def an_input(kind: str, leading: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    if kind == "embedding":
        return torch.randint(IN, leading)
    if kind.startswith("convolution"):
        positions = [4, 3][: LAYERS[kind]().weight.dim() - 2]  # type: ignore[union-attr,operator]
        return torch.randn(max([1, *leading]), IN, *positions, dtype=dtype)
    return torch.randn(*leading, IN, dtype=dtype)


def trained_of(layer: nn.Module) -> Parameters:
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


def half(out: Tensor) -> Tensor:
    out[..., :2] *= 0.5
    return out


IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add a trained tensor": lambda out, w: out.add_(w.to(out.dtype)),
    "multiply by a trained tensor": lambda out, w: out.mul_(w.to(out.dtype)),
    "SiLU": lambda out, w: F.silu(out, inplace=True) * w.to(out.dtype),
    "tanh": lambda out, w: out.tanh_() * w.to(out.dtype),
    "ReLU": lambda out, w: F.relu(out, inplace=True) * w.to(out.dtype),
    "dropout of all": lambda out, w: F.dropout(out, 1.0, inplace=True) + w.to(out.dtype),
    "a slice": lambda out, w: half(out).add_(w.to(out.dtype)),
    "a view": lambda out, w: out.flatten().view_as(out).add_(w.to(out.dtype)),
    "a row": lambda out, w: out.index_fill_(-1, torch.tensor([1]), 3.0).add_(w.to(out.dtype)),
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "checkpointing": nullcontext,
}


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert found.shape == expected.shape
    distance = (found.double() - expected).norm()
    assert distance <= tolerance * (expected.norm() + 1), (distance, expected.norm())


@settings(max_examples=250)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    method=st.sampled_from(sorted(METHODS)),
    leading=st.lists(st.integers(1, 3), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    mode=st.sampled_from(sorted(MODES)),
    change=st.sampled_from(sorted(IN_PLACE)),
    r=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_outputs_can_be_changed_in_place(
    kind: str, method: str, leading: list[int], dtype: torch.dtype, mode: str, change: str, r: int, seed: int
) -> None:
    assume(method != "VeRA" or "linear" in kind or kind == "conv1d")
    # Where rounding puts an output on the other side of zero, its gradient is another.
    assume(change != "ReLU" or (dtype != torch.bfloat16 and mode != "autocast"))
    torch.manual_seed(seed)
    layer, x = adapted(kind, method, dtype, r), an_input(kind, leading, dtype)
    if x.is_floating_point():
        x.requires_grad_()
    wrt = {"x": x} if x.requires_grad else {}
    wrt |= trained_of(layer)
    out_shape = reference(layer, {"weight": layer.weight.double()}, x.double() if wrt.get("x") is x else x).shape  # type: ignore[operator,union-attr]
    wrt["w"] = torch.randn(out_shape[-1:], requires_grad=True, dtype=dtype)
    with MODES[mode]():
        out = checkpoint(layer, x, use_reentrant=False) if mode == "checkpointing" else layer(x)
        if mode == "inference":
            out = IN_PLACE[change](out, wrt["w"])
    if mode != "inference":
        out = IN_PLACE[change](out, wrt["w"])  # after no_grad, with gradients on

    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in wrt.items()}
    expected = reference(layer, {name: exact[name] for name in trained_of(layer)}, exact.get("x", x))
    if mode == "no_grad":
        expected = expected.detach()
    expected = IN_PLACE[change](expected * 1, exact["w"])
    # Under autocast an embedding is as it was, and float64 is left alone.
    precision = torch.bfloat16 if mode == "autocast" and dtype != torch.float64 else dtype
    assert_close(out, expected.detach(), precision)
    if mode == "inference":
        return
    upstream = torch.randn(out.shape, dtype=dtype)
    found = torch.autograd.grad(out, list(wrt.values()), upstream.to(out.dtype), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(exact.values()), upstream.double(), allow_unused=True)
    for name, one, other in zip(wrt, found, wanted, strict=True):
        if one is None or other is None:
            assert (one is None or not one.any()) and (other is None or not other.any()), name
        else:
            assert one.dtype == wrt[name].dtype
            assert_close(one, other, precision)


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (2, 1, 3, IN), (1, 2, 1, 3, IN)])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_outputs_are_no_views_of_what_was_made_without_gradients(kind: str, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        out = adapted(kind)(torch.randn(shape, dtype=torch.float64))
    bias = torch.ones(OUT, dtype=torch.float64, requires_grad=True)
    out += bias
    out.sum().backward()
    assert bias.grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)])
@pytest.mark.parametrize("kind", ["linear", "linear without bias"])
def test_compiled_outputs_can_be_changed_in_place(kind: str, shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    layer, x = adapted(kind, dtype=torch.float32), torch.randn(shape, requires_grad=True)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    torch.compiler.reset()
    wrt = [x, *trained_of(layer).values()]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for found, expected in zip(
        torch.autograd.grad(compiled(x).square().sum(), wrt), torch.autograd.grad(model(x).square().sum(), wrt)
    ):
        torch.testing.assert_close(found, expected)


def test_compiled_transforms() -> None:
    torch.manual_seed(0)
    layer, x = adapted("linear", dtype=torch.float32), torch.randn(2, 3, IN)
    trained = {name: parameter.detach() for name, parameter in trained_of(layer).items()}

    def loss(trained: Parameters, x: Tensor) -> Tensor:
        return functional_call(layer, trained, (x,)).pow(3).sum()

    def tangent(trained: Parameters, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(trained, forward_ad.make_dual(x, x))).tangent

    for f in (vmap(grad(loss), in_dims=(None, 0)), jacfwd(loss, 1), hessian(loss, 1), tangent):
        torch.compiler.reset()
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(trained, x), f(trained, x))


def derivatives(f: Callable[[Parameters, Tensor], Tensor], trained: Parameters, x: Tensor) -> dict[str, Any]:
    """What torch.func makes of a function of the trained parameters and of one input."""

    def loss(trained: Parameters, x: Tensor) -> Tensor:
        return f(trained, x).pow(3).sum()

    stack = {name: torch.stack([tensor, 0.5 * tensor]) for name, tensor in trained.items()}
    found = {
        "grad": grad(loss)(trained, x),
        "of each sample": vmap(grad(loss), in_dims=(None, 0))(trained, x),
        "of an ensemble": vmap(grad(loss), in_dims=(0, None))(stack, x),
        "forward": jvp(lambda p: f(p, x), (trained,), (trained,))[1],
        "jacrev": jacrev(f)(trained, x),
        "jacfwd": jacfwd(f)(trained, x),
        "hessian": hessian(loss)(trained, x),
    }
    if x.is_floating_point():
        found["jvp of x"] = jvp(lambda x: f(trained, x), (x,), (x,))[1]
        found["jacfwd of x"] = jacfwd(f, 1)(trained, x)
        found["hessian of x"] = hessian(loss, 1)(trained, x)
        found["across"] = jacfwd(jacrev(loss), 1)(trained, x)
        found["forward over forward"] = jacfwd(jacfwd(loss, 1))(trained, x)
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_transforms_are_those_of_the_reference(kind: str, method: str) -> None:
    if method == "VeRA" and kind not in ("linear", "linear without bias", "conv1d"):
        pytest.skip("refused")
    torch.manual_seed(0)
    layer, x = adapted(kind, method), an_input(kind, [2, 3])
    trained = {name: parameter.detach() for name, parameter in trained_of(layer).items()}
    found = derivatives(lambda p, x: functional_call(layer, p, (x,)), trained, x)
    torch.testing.assert_close(found, derivatives(lambda p, x: reference(layer, p, x), trained, x))


def test_transforms_reach_the_frozen_weight_too() -> None:
    torch.manual_seed(0)
    layer, x = adapted("linear"), an_input("linear", [2, 3])
    every = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    for transform in (jacrev, jacfwd):
        found = transform(lambda p: functional_call(layer, p, (x,)).pow(3).sum())(every)
        expected = transform(lambda p: reference(layer, p, x).pow(3).sum())(every)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["linear", "linear without bias"])
@pytest.mark.parametrize("which", ["x", "lora.default.lora_A", "lora.default.lora_B", "weight"])
def test_dual_numbers(kind: str, which: str) -> None:
    """Forward mode by itself, and over a backward pass."""
    torch.manual_seed(0)
    layer, x = adapted(kind), an_input(kind, [2, 3])
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    found = []
    for f in (lambda p, x: functional_call(layer, p, (x,)), lambda p, x: reference(layer, p, x)):
        torch.manual_seed(1)
        with forward_ad.dual_level():
            tensors = {"x": x, **parameters}
            dual = forward_ad.make_dual(tensors[which], torch.randn_like(tensors[which]))
            tensors[which] = dual.requires_grad_()
            out = f({name: tensor for name, tensor in tensors.items() if name != "x"}, tensors["x"])
            (gradient,) = torch.autograd.grad(out.pow(3).sum(), tensors[which], create_graph=True)
            found.append((forward_ad.unpack_dual(out), forward_ad.unpack_dual(gradient)))
            assert found[-1][0].tangent is not None
    torch.testing.assert_close(found[0], found[1])


def test_tangents_that_come_in_with_the_backward_pass() -> None:
    torch.manual_seed(0)
    layer, x = adapted("linear"), an_input("linear", [2, 3]).requires_grad_()
    wrt = [x, *trained_of(layer).values()]
    out = layer(x)
    upstream, tangent = torch.randn_like(out), torch.randn_like(out)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(out, wrt, forward_ad.make_dual(upstream, tangent), retain_graph=True)
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    torch.testing.assert_close(tangents, list(torch.autograd.grad(out, wrt, tangent, retain_graph=True)))
    batch = torch.stack([upstream, tangent])
    batched = torch.autograd.grad(out, wrt, batch, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close([gradient[1] for gradient in batched], tangents)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_functional_jacobians(strategy: str) -> None:
    torch.manual_seed(0)
    layer, x = adapted("linear"), an_input("linear", [2, 3])
    found = torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy=strategy)
    trained = {name: parameter.detach() for name, parameter in trained_of(layer).items()}
    torch.testing.assert_close(found, jacrev(lambda x: reference(layer, trained, x))(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 2, 1, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_with_a_change_in_place(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, b, A, B = (torch.randn(s, dtype=dtype) for s in (shape, (3, 4), (3,), (2, 4), (3, 2)))
    tensors = [tensor.requires_grad_() for tensor in (x, b, A, B)]

    def changed(x: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        out = low_rank_linear(x, weight, b if bias else None, A, B, 0.7)
        return out.mul_(b).sin_()

    assert torch.autograd.gradcheck(changed, tensors)
    assert torch.autograd.gradgradcheck(changed, tensors)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "embedding"])
def test_nested_inputs(kind: str, method: str) -> None:
    if method == "VeRA" and kind == "embedding":
        pytest.skip("refused")
    if kind == "conv1d":
        pytest.skip("transformers' own Conv1D takes none")
    torch.manual_seed(0)
    layer = adapted(kind, method, torch.float32)
    parts = [an_input(kind, [length], torch.float32) for length in (2, 3)]
    for part in parts:
        part.requires_grad_(part.is_floating_point())
    wrt = [*(part for part in parts if part.requires_grad), *trained_of(layer).values()]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    out, expected = torch.cat(list(layer(nested).unbind())), layer(torch.cat(parts))
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), wrt) for y in (out, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN)])
@pytest.mark.parametrize("kind", ["linear", "linear without bias"])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_saved_traces_hold_for_any_shape(kind: str, shape: tuple[int, ...], mode: Any) -> None:
    torch.manual_seed(0)
    layer = adapted(kind)
    file = io.BytesIO()
    with mode():
        torch.jit.save(torch.jit.trace(layer, (torch.randn(shape, dtype=torch.float64),)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for other in [(IN,), (4, IN), (2, 5, IN), (1, 2, 3, IN)]:
        x = torch.randn(other, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["linear", "linear without bias"])
def test_exported_programs(kind: str, strict: bool) -> None:
    torch.manual_seed(0)
    layer, x = adapted(kind), torch.randn(2, 3, IN, dtype=torch.float64)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,), dynamic_shapes=(batch,), strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 5):
        x = torch.randn(rows, 3, IN, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), layer(x))


def test_a_backward_pass_within_autocast_of_a_layer_that_ran_without() -> None:
    """As where a layer is kept in float32, and ``manual_backward`` called in a step under autocast."""
    torch.manual_seed(0)
    layer, x = adapted("linear", dtype=torch.float32), torch.randn(2, 3, IN, requires_grad=True)
    wrt = [x, *trained_of(layer).values()]
    expected = torch.autograd.grad(layer(x).square().sum(), wrt)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            out = layer(x)
        found = torch.autograd.grad(out.square().sum(), wrt)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_the_meta_device() -> None:
    layer = inject(nn.Linear(IN, OUT, device="meta"), LoraConfig(r=2, target_modules=".*"))
    out = layer(torch.empty(2, 3, IN, device="meta", requires_grad=True))
    assert out.shape == (2, 3, OUT)
    out.sum().backward()
    assert layer.lora["default"].lora_B.grad.is_meta  # type: ignore[index]


def kept_by(call: Callable[[], Tensor]) -> list[int]:
    """How many elements each of the tensors has that autograd keeps."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        call()
    return sorted(kept)


@pytest.mark.parametrize("x_trained", [True, False])
@pytest.mark.parametrize("method", ["LoRA", "LoRA-FA"])
def test_no_more_is_kept_than_by_the_plain_path(method: str, x_trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted("linear", method), torch.randn(5, 7, IN, dtype=torch.float64, requires_grad=x_trained)
    fast = kept_by(lambda: layer(x))
    monkeypatch.setattr(functional, "is_plain", lambda *tensors: False)
    assert fast == kept_by(lambda: layer(x))
    assert (x.numel() in fast) is (method == "LoRA")


def test_a_frozen_weight_may_change_before_a_backward_pass_that_does_not_need_it() -> None:
    layer = adapted("linear")
    out = layer(torch.randn(3, IN, dtype=torch.float64))
    with torch.no_grad():
        layer.weight.zero_()  # type: ignore[operator,union-attr]
    out.sum().backward()


def test_trained_rows_of_a_head_under_transforms() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)}).double()
    model["head"].weight = model["embed"].weight
    inject(model, LoraConfig(r=2, target_modules=[], trainable_token_indices=[1, 3]))
    head, x = model["head"], torch.randn(2, 4, 3, dtype=torch.float64)
    weight, name = head.weight.detach(), "lora.default.trainable_tokens"

    def logits(rows: Tensor) -> Tensor:
        return functional_call(head, {name: rows}, (x,)).sin()

    def expected(rows: Tensor) -> Tensor:
        return F.linear(x, weight.index_copy(0, torch.tensor([1, 3]), rows)).sin()

    stack = torch.randn(3, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(logits)(stack), vmap(expected)(stack))
    for transform in (jacrev, jacfwd, hessian):
        torch.testing.assert_close(transform(logits)(stack[0]), transform(expected)(stack[0]))
