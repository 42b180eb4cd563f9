"""Layers whose object has a forward of its own: accelerate's hooks, patched methods, checkpointing, traced graphs."""

import functools
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from helpers.toys import randomize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoraConfig,
    TargetError,
    adapters_for,
    add_adapter,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)

X = torch.tensor([[0, 3, 5], [1, 1, 2]])


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv, self.first = nn.Embedding(6, 8), nn.Conv1d(3, 4, 1), nn.Linear(8, 8)
        self.second, self.attention, self.head = Conv1D(6, 8), nn.MultiheadAttention(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.conv(self.embedding(x)))))
        return self.head(x + self.attention(x, x, x)[0])


KINDS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ["embedding", "conv", "first", "second", "attention", "head"]},
    "linear": {"target_modules": ["first", "head"]},
    "dora": {"target_modules": ["embedding", "conv", "first", "head"], "use_dora": True},
    "vera": {"target_modules": ["first", "second"], "use_vera": True},
    "tokens": {"target_modules": ["first"], "trainable_token_indices": {"embedding": [1, 3]}},
    "parameters": {"target_modules": None, "target_parameters": ["first.weight", "second.weight"]},
}


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _attention_stays(offload: Callable[..., Any]) -> Callable[[nn.Module, Path], nn.Module]:
    # Accelerate cannot offload nn.MultiheadAttention, which reads the weight of its output layer without a call.
    def dispatch(model: Any, folder: Path) -> nn.Module:
        for name, child in model.named_children():
            if name != "attention":
                offload(child, folder / name)
        return model

    return dispatch


def _simple(model: nn.Module, _: Path) -> nn.Module:
    for child in model.children():
        accelerate.hooks.add_hook_to_module(child, accelerate.hooks.ModelHook())
    return model


DISPATCHES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "hooks": _simple,
    "cpu offload": _attention_stays(lambda child, _: accelerate.cpu_offload(child, torch.device("cpu"))),
    "disk offload": _attention_stays(lambda child, path: accelerate.disk_offload(child, path, torch.device("cpu"))),
}


def trained(kind: str, folder: Path) -> Tensor:
    """Save an adapter of a kind, and tell what the model computes with it."""
    model = inject(base(), LoraConfig(r=2, **KINDS[kind]))
    randomize(model, 0.5)
    save_adapter(model, folder)
    return model(X).detach()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", DISPATCHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["dispatch", "inject"])
@torch.no_grad()
def test_dispatched_models(kind: str, how: str, first: str, tmp_path: Path) -> None:
    want, alone = trained(kind, tmp_path / "adapter"), base()(X)
    model: Any = base()
    for step in ("dispatch", "inject") if first == "dispatch" else ("inject", "dispatch"):
        if step == "inject":
            load_adapter(model, tmp_path / "adapter")
        else:
            DISPATCHES[how](model, tmp_path / "weights")
    close(model(X), want)
    for _ in range(2):
        merge(model)
        close(model(X), want)
        unmerge(model)
        close(model(X), want)
    with disabled(model):
        assert torch.equal(model(X), alone)
    save_adapter(model, tmp_path / "again")
    close(load_adapter(base(), tmp_path / "again")(X), want)
    eject(model, merge=True)
    close(model(X), want)
    unmerge(model)
    close(model(X), want)
    eject(model)
    assert torch.equal(model(X), alone)
    load_adapter(model, tmp_path / "adapter")
    close(model(X), want)
    remove_hook_from_module(model, recurse=True)
    close(model(X), want)
    eject(model)
    assert torch.equal(model(X), alone)


@torch.no_grad()
def test_several_offloaded_adapters(tmp_path: Path) -> None:
    model, settings = base(), KINDS["linear"]
    for name in ("default", "second"):
        add_adapter(model, LoraConfig(r=2, **settings), name)
        set_adapter(model, name)
        randomize(model, 0.5)
    wanted = []
    for names in ("default", "second", ["default", "second"]):
        wanted.append(set_adapter(model, names)(X))
    with adapters_for(model, ["second", "default"]):
        mixed = model(X)
    DISPATCHES["cpu offload"](model, tmp_path)
    for names, want in zip(("default", "second", ["default", "second"]), wanted):
        close(set_adapter(model, names)(X), want)
        close(merge(model)(X), want)
        unmerge(model)
    with adapters_for(model, ["second", "default"]):
        close(model(X), mixed)


@torch.no_grad()
def test_the_map_of_a_model_that_is_offloaded_as_a_whole(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    x = torch.randn(2, 4)
    model = inject(net(), LoraConfig(r=2, target_modules=["0", "2"]))
    randomize(model, 0.5)
    save_adapter(model, tmp_path)
    served = accelerate.dispatch_model(net(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    close(load_adapter(served, tmp_path)(x), model(x))
    close(merge(served)(x), model(x))
    assert torch.equal(eject(served)(x), net()(x))


def test_what_is_taken_from_an_offloaded_base_is_refused(tmp_path: Path) -> None:
    model = DISPATCHES["cpu offload"](base(), tmp_path)
    for more, match in (
        ({"init_lora_weights": "pissa"}, "changes its weight"),
        ({"modules_to_save": ["head"]}, "head.weight would be trained in full"),
    ):
        with pytest.raises(TargetError, match=match):
            inject(model, LoraConfig(r=2, target_modules=["first"], **more))
    with torch.no_grad():
        assert torch.equal(model(X), base()(X))


def _patched(layer: nn.Module) -> None:
    old = layer.forward
    layer.forward = lambda *args: 2 * old(*args)  # type: ignore[method-assign]


def _method(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, *args: 2 * type(self).forward(self, *args), layer)  # type: ignore


def _partial(layer: nn.Module) -> None:
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


PATCHES = {"closure": _patched, "partial": _partial}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_forward_that_was_patched_is_called_through(patch: str, kind: str) -> None:
    torch.manual_seed(0)
    layer, x = (nn.Linear(4, 3) if kind == "linear" else Conv1D(3, 4)), torch.randn(2, 4)
    PATCHES[patch](layer)
    model, shadow = nn.Sequential(layer), layer.forward
    alone = model(x)
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(x), alone)
    randomize(model, 0.5)
    adapted = model(x)
    assert not torch.allclose(adapted, alone)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.lora.parameters())
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "second")
    with adapters_for(model, ["default", None]):
        close(model(x), torch.stack([adapted[0], alone[1]]))
    set_adapter(model, None)
    assert torch.equal(model(x), alone)
    set_adapter(model, "default")
    if patch == "partial":
        close(merge(model)(x), adapted)
        unmerge(model)
    eject(model)
    assert torch.equal(model(x), alone)
    assert layer.forward is shadow


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_warning_says_what_a_forward_of_its_own_may_mean(kind: str) -> None:
    """And its way out merges what was trained."""
    torch.manual_seed(0)
    layer, x = (nn.Linear(4, 3) if kind == "linear" else Conv1D(3, 4)), torch.randn(2, 4)
    model = nn.Sequential(layer, nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eject(inject(_simple(model, Path()), LoraConfig(r=2, target_modules=["0", "1"])))
    remove_hook_from_module(model, recurse=True)
    _patched(layer)
    with pytest.warns(UserWarning, match=r"^'0' were given a forward of their own.*\[\"0\.weight\"\]"):
        eject(inject(model, LoraConfig(r=2, target_modules=["0", "1"])))
    inject(model, LoraConfig(r=2, target_modules=["1"], target_parameters=["0.weight"]))
    randomize(model, 0.5)
    adapted = model(x)
    close(eject(model, merge=True)(x), adapted)


@pytest.mark.parametrize("patch", [*PATCHES, "method"])
@torch.no_grad()
def test_a_forward_that_is_patched_later_survives_the_adapters(patch: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    randomize(model, 0.5)
    {**PATCHES, "method": _method}[patch](model[0])
    adapted = model(x)
    close(merge(model)(x), adapted)
    eject(model, merge=True)
    close(model(x), adapted)
    close(unmerge(model)(x), adapted)
    eject(model)
    assert not torch.allclose(model(x), adapted)


@pytest.mark.parametrize("kind", ["embedding", "conv", "tokens"])
def test_kinds_that_must_be_what_they_say_are_refused(kind: str) -> None:
    model = base()
    layer = model.conv if kind == "conv" else model.embedding
    _patched(layer)
    given = {"trainable_token_indices": {"embedding": [1]}} if kind == "tokens" else {"target_modules": [kind]}
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=r"the object has a forward of its own.*Nothing was changed"):
        inject(model, LoraConfig(r=2, **{"target_modules": ["first"], **given}))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_adapter_with_hooks_is_called() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    seen = []
    model[0].lora["default"].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    model(torch.randn(2, 4))
    assert seen
    with adapters_for(model, ["default", None]):
        model(torch.randn(2, 4))
    assert len(seen) == 2


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.fx.symbolic_trace])
def test_wrapped_and_traced(wrap: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 4)
    model = wrap(net)
    alone = model(x)
    inject(model, LoraConfig(r=2, target_modules=["0", "2"]))
    assert torch.equal(model(x), alone)
    randomize(model, 0.5)
    adapted = model(x)
    assert not torch.allclose(adapted, alone)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    close(merge(model)(x), adapted)
    eject(model, merge=True)
    close(model(x), adapted)
    unmerge(model)
    eject(model)
    assert torch.equal(model(x), alone)


_STEPS = ("inject", "eject", "merge", "unmerge", "merge and eject", "hook", "unhook", "patch")


@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.sampled_from(_STEPS), max_size=8))
@example(steps=["patch", "hook", "inject", "hook"])
@torch.no_grad()
def test_any_order(steps: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    model = nn.Sequential(layer)
    alone = model(x)
    times, patches = 1, 0
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    update = inject(nn.Sequential(layer), config)(x) - alone
    unmerge(eject(model))
    is_in = is_hooked = False
    for step in steps:
        # One that comes around the adapters scales them too, and so does one around a hook, in which they are put.
        if step == "patch" and (is_in or is_hooked or patches):
            continue
        if step == "unhook" and patches:  # which takes away what was put over the hook
            continue
        if step == "inject":
            inject(unmerge(model), config)
            is_in = True
        elif step == "hook":
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
            is_hooked = True
        elif step == "unhook":
            remove_hook_from_module(layer)
            is_hooked = False
        elif step == "patch":
            _patched(layer)
            times, patches = 2 * times, 1
        elif step == "unmerge":
            unmerge(model)
        elif is_in and hasattr(layer, "lora"):
            if step == "merge":
                merge(model)
            else:
                eject(model, merge=step == "merge and eject")
                is_in = step == "merge and eject"
        merged = is_in and (not hasattr(layer, "lora") or layer.merged)
        # An adapter adds to what the patch made, as to what a subclass's forward makes; the patch is around the weight.
        close(model(x), times * alone + is_in * (times if merged else 1) * update)
