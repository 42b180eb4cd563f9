"""What is done with one adapter costs what it touches, however many others there are: counted, not timed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoraConfig,
    active_adapters,
    adapter_state_dict,
    adapters_for,
    add_adapter,
    combine_adapters,
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

LAYERS = 6


def model(adapters: int) -> nn.Module:
    """Layers with so many adapters."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(LAYERS)))
    for index in range(adapters):
        put = add_adapter if index else inject
        put(module, LoraConfig(r=1, target_modules=["0"], seed=index, init_lora_weights=False), f"a{index}")
    return module


def calls(work: Callable[[], Any]) -> int:
    """How many functions of Python a piece of work calls, generators' steps included."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def use(module: nn.Module, names: list[str]) -> None:
    with adapters_for(module, names), disabled(module):
        pass


def operations(module: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    config = LoraConfig(r=1, target_modules=["0"])
    saved = LoraConfig(r=1, target_modules=["0"], modules_to_save=["5.0"], exclude_modules=["5.0"])
    return {
        "add": lambda: add_adapter(module, config, "new"),
        "delete": lambda: delete_adapter(module, "new"),
        "add one that trains a module in full": lambda: add_adapter(module, saved, "full"),
        "choose that": lambda: set_adapter(module, "full"),
        "delete that": lambda: delete_adapter(module, "full"),
        "choose": lambda: set_adapter(module, "a1"),
        "ask": lambda: active_adapters(module),
        "use": lambda: use(module, ["a0", "a1"]),
        "save": lambda: save_adapter(module, folder, "a1"),
        "load": lambda: load_adapter(module, folder, "loaded"),
        "combine": lambda: combine_adapters(module, ["a0", "a1"], "both"),
        "merge": lambda: merge(module, "a0"),
        "unmerge": lambda: unmerge(module),
    }


def test_no_operation_on_one_looks_at_all(tmp_path: Path) -> None:
    counts = []
    for number in (3, 23):
        module = model(number)
        work = operations(module, tmp_path / str(number))
        counts.append({name: calls(call) for name, call in work.items()})
    few, many = counts
    # A step or two for each adapter's record are fine, and none for each of its layers.
    grown = {name: (many[name] - few[name]) / 20 for name in few}
    assert max(grown.values()) < 2 * LAYERS, grown


@pytest.mark.parametrize("work", [adapter_state_dict, lambda module: eject(module)])
def test_what_touches_all_grows_with_their_number(work: Callable[[nn.Module], Any]) -> None:
    found = [calls(lambda: work(module)) for module in map(model, (4, 8, 16))]  # noqa: B023
    assert found[2] - found[1] < 2.5 * (found[1] - found[0]) + 200
