"""Injections are found from any module that holds their layers, in copies and in other processes too."""

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import assert_same_tensors, randomize, snapshot
from torch import Tensor, nn

from lightning_lora import (
    LoraConfig,
    TargetError,
    active_adapters,
    adapter_state_dict,
    adapters,
    add_adapter,
    delete_adapter,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.freeze import FrozenNorm
from lightning_lora.model.record import injections, named_injections

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
CONFIG = LoraConfig(r=2, target_modules=["0", "3"])


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).eval()


class Plan(nn.Module):
    """A module around a network, made for one run."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["net"](x)


def planned(**given: Any) -> tuple[nn.Module, Plan]:
    """A network, and a module around it on which an adapter was injected and trained."""
    net = body()
    plan = inject(Plan(net), LoraConfig(r=2, **({"target_modules": ["net.0", "net.3"]} | given)))
    randomize(plan, 0.5)
    return net, plan


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("around", [lambda net: net, Wrapper], ids=["itself", "another wrapper"])
@pytest.mark.parametrize("given", [{}, {"bias": "all"}, {"init_lora_weights": "pissa"}], ids=str)
def test_from_another_module(given: dict[str, Any], around: Callable[..., Any], is_gone: bool, tmp_path: Path) -> None:
    net, plan = planned(**given)
    model = around(net)
    adapted, base = net(X).detach(), body()(X)
    if is_gone:
        del plan
    assert list(adapters(model)) == active_adapters(model) == ["default"]
    close(merge(model)(X), adapted)
    close(unmerge(model)(X), adapted)
    with disabled(model):
        close(model(X), base)
    save_adapter(model, tmp_path)
    close(load_adapter(around(body()), tmp_path)(X), adapted)
    close(eject(model, merge=True)(X), adapted)
    assert not any("lora" in name for name in model.state_dict())
    close(unmerge(model)(X), adapted)
    eject(model)
    assert_same_tensors(snapshot(net), snapshot(body()))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(isinstance(module, FrozenNorm) for module in net)


@pytest.mark.parametrize("is_gone", [True, False])
def test_merged_and_taken_out_before_the_root_goes(is_gone: bool) -> None:
    net, plan = planned(bias="all")
    adapted = net(X).detach()
    eject(plan, merge=True)
    if is_gone:
        del plan
    close(net(X), adapted)
    close(unmerge(net)(X), adapted)
    eject(net)
    assert_same_tensors(snapshot(net), snapshot(body()))


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("merged", [None, merge, lambda plan: eject(plan, merge=True)], ids=["no", "merged", "ejected"])
def test_a_new_module_around_goes_on(merged: Callable[[Plan], Any] | None, is_gone: bool) -> None:
    net, plan = planned()
    adapted, config = net(X).detach(), adapters(plan)["default"]
    if merged:
        merged(plan)
    if is_gone:
        del plan
    again = unmerge(Plan(net))
    inject(again, config)
    close(net(X), adapted)
    assert [name for name, _ in named_injections(again)] == [""]
    assert injections(again)[0].root is again
    assert injections(again)[0].targets == ["net.0", "net.3"]
    fresh = {name: tensor for name, tensor in again.state_dict().items() if name.startswith("head.")}
    eject(again)
    assert_same_tensors(snapshot(net), snapshot(body()))
    assert_same_tensors({name: again.state_dict()[name] for name in fresh}, fresh)


def test_what_was_trained_in_full_and_is_gone_is_not_gone_on_with() -> None:
    net, plan = planned(modules_to_save=["head"])
    config = adapters(plan)["default"]
    del plan
    with pytest.raises(TargetError, match="already carry an adapter"):
        inject(Plan(net), config)
    eject(net)
    inject(Plan(net), config)


def test_a_part_of_the_layers_is_refused_with_the_name_of_the_root() -> None:
    net, plan = planned()
    part: nn.Module = net[0]  # type: ignore[index]
    assert unmerge(part) is part  # nothing is merged

    def refused(*calls: Callable[[nn.Module], Any], plan: Plan = plan) -> None:
        state = snapshot(plan)
        for call in calls:
            with pytest.raises(ValueError, match=r"Only a part of the layers .* the Plan that has all of them"):
                call(part)
        assert_same_tensors(snapshot(plan), state)

    refused(merge, eject, lambda part: set_adapter(part, "default"), lambda part: delete_adapter(part, "default"))
    merge(plan)
    refused(unmerge, eject)
    eject(plan, merge=True)
    refused(unmerge, merge)
    unmerge(plan)
    plan, refused.__kwdefaults__["plan"] = None, None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Only a part of the layers"):
        merge(net[0])  # type: ignore[index]
    eject(nn.ModuleList([net[0], net[3]]))  # type: ignore[index]
    assert_same_tensors(snapshot(net), snapshot(body()))


def test_the_root_stays_the_root_while_it_lives() -> None:
    net, plan = planned()
    before = dict(named_injections(plan))[""].targets
    number = fingerprint(injections(plan)[0])
    for call in (merge, unmerge, lambda model: set_adapter(model, None), lambda model: set_adapter(model, "default")):
        call(Wrapper(net))
        call(net)
    assert adapter_state_dict(net).keys() == {name.removeprefix("net.") for name in adapter_state_dict(plan)}
    assert dict(named_injections(plan))[""].targets == before
    assert injections(plan)[0].root is plan
    assert fingerprint(injections(plan)[0]) == number
    assert dict(named_injections(net))[""].targets == ["0", "3"]
    add_adapter(plan, LoraConfig(r=3, target_modules=["net.0"]), "second")
    assert list(adapters(net)) == ["default", "second"]
    delete_adapter(net, "default")
    assert list(adapters(plan)) == ["second"]


def test_two_roots_of_the_same_layers() -> None:
    net, plan = planned()
    first = net(X).detach()
    add_adapter(net, LoraConfig(r=3, target_modules=["0"]), "second")
    assert list(adapters(plan)) == ["default", "second"]
    for model in (plan, net):
        close(net(X), first)
        eject(model, merge=True)
        close(net(X), first)
        unmerge(model)
        assert adapters(net).keys() == adapters(plan).keys() == {"default", "second"}
    eject(net)
    assert not adapters(plan)
    assert_same_tensors(snapshot(net), snapshot(body()))
    assert all(parameter.requires_grad for parameter in plan.parameters())


def test_nothing_is_kept_alive() -> None:
    net, plan = planned(bias="all")
    kept = [weakref.ref(module) for module in (plan, plan.head)]
    layers = [weakref.ref(module) for module in net]  # type: ignore[attr-defined]
    del plan
    gc.collect()
    assert all(found() is None for found in kept)
    eject(merge(net), merge=True)
    del net
    gc.collect()
    assert all(found() is None for found in layers)


def _pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("part", ["root", "parent", "child"])
def test_copies(how: str, merged: bool, part: str) -> None:
    net, plan = planned(bias="all", init_lora_weights="pissa")
    adapted = net(X).detach()
    if merged:
        merge(plan)
    before = snapshot(plan)
    if part == "parent":
        twin = COPIES[how](nn.ModuleDict({"plan": plan}))
        network = twin["plan"].net
    elif part == "root":
        twin = COPIES[how](plan)
        network = twin.net
    else:
        twin = network = COPIES[how](net)
    close(network(X), adapted)
    assert [name for name, _ in named_injections(twin)] == [{"parent": "plan"}.get(part, "")]
    close(merge(twin) and network(X), adapted)
    close(unmerge(twin) and network(X), adapted)
    randomize(twin, 0.5)
    eject(twin)
    close(network(X), body()(X))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, FrozenNorm) for module in network)
    # Nothing of this has reached the original.
    assert_same_tensors(snapshot(plan), before)
    assert injections(plan)[0].root is plan
    close(unmerge(plan) and net(X), adapted)
    eject(plan)
    assert_same_tensors(snapshot(net), snapshot(body()))


def test_copies_of_layers_are_each_a_record_of_their_own() -> None:
    net, plan = planned()
    adapted = net(X).detach()
    layer = copy.deepcopy(net[0])  # type: ignore[index]
    eject(plan, merge=True)
    x = torch.randn(2, 4)
    before = layer(x).detach()
    close(merge(layer)(x), before)
    eject(layer)
    assert torch.equal(layer.weight, body()[0].weight)
    close(net(X), adapted)


def test_a_copied_part_in_another_module_has_no_part_in_what_else_is_there() -> None:
    _, plan = planned(modules_to_save=["head"])
    again = Plan(copy.deepcopy(plan.net))
    head = snapshot(again.head)
    adapted = again.net(X).detach()
    close(merge(again) and again.net(X), adapted)
    eject(again)
    assert_same_tensors(snapshot(again.net), snapshot(body()))
    assert_same_tensors(snapshot(again.head), head)


def _merge_in_another_process(file: Path, results: Path) -> None:
    model = torch.load(file, weights_only=False)
    merged = merge(model)(X).detach()
    unmerged = unmerge(model)(X).detach()
    torch.save((list(adapters(model)), merged, unmerged, eject(model).net.state_dict()), results)


def test_pickled_in_another_process(tmp_path: Path) -> None:
    _, plan = planned(bias="all")
    adapted = plan(X).detach()
    torch.save(plan, tmp_path / "model")
    process = multiprocessing.get_context("spawn").Process(
        target=_merge_in_another_process, args=(tmp_path / "model", tmp_path / "results")
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    names, merged, unmerged, base = torch.load(tmp_path / "results")
    assert names == ["default"]
    close(merged, adapted)
    close(unmerged, adapted)
    assert_same_tensors(base, snapshot(body()))
