"""What an optimizer has noted for a parameter is that parameter's again, in whatever order they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.toys import Toy, assert_same_tensors, loader
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.trainer.optimizer_state import optimized_names, reordered

NAMES = list("abcdef")


def optimizer_of(model: nn.ParameterDict, groups: list[list[str]], kind: Any, named: bool) -> Any:
    by_name = [[(name, model[name]) for name in names] for names in groups]
    return kind([{"params": each if named else [p for _, p in each]} for each in by_name], lr=0.1)


@given(
    first=st.permutations(NAMES),
    second=st.permutations(NAMES),
    cut=st.integers(1, 5),
    kind=st.sampled_from([torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adamax]),
    named=st.booleans(),
)
def test_any_order(first: list[str], second: list[str], cut: int, kind: Any, named: bool) -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in NAMES})
    saved_groups = [first[:cut], first[cut:]]
    groups = [[name for name in second if name in each] for each in saved_groups]
    saved, fresh = (optimizer_of(model, each, kind, named) for each in (saved_groups, groups))
    for number, name in enumerate(NAMES):
        model[name].grad = torch.full((2,), 1.0 + number)
    saved.step()
    (old,), (new,) = optimized_names(model, [saved]), optimized_names(model, [fresh])
    assert (old, new) == (saved_groups, groups)
    fresh.load_state_dict(reordered(saved.state_dict(), old, new))
    for name in NAMES:
        assert_same_tensors(fresh.state[model[name]], saved.state[model[name]])
    if named:
        assert [group["param_names"] for group in fresh.param_groups] == groups


@given(names=st.lists(st.lists(st.sampled_from(["", *NAMES]), max_size=3), max_size=2))
def test_others_are_left_as_they_are(names: list[list[str]]) -> None:
    state = {"state": {}, "param_groups": [{"params": [0, 1]}]}
    if list(map(sorted, names)) != [["a", "b"]]:
        assert reordered(state, names, [["b", "a"]]) is state


class Turned(Toy):
    """Two layers of one shape, made in one order or the other."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__(dropout=0.0)
        for number in (1, 0) if turned else (0, 1):
            layer = nn.Linear(8, 8)
            nn.init.constant_(layer.weight, 0.1 + 0.2 * number)
            nn.init.zeros_(layer.bias)
            self.add_module(f"part{number}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.part1(self.part0(x)))


def run(folder: Path, epochs: int, turned: bool, order: str, ckpt_path: Path | None = None) -> Any:
    targets = ["part0", "part1"]
    loras = {
        name: LoRA(r=2, adapter_name=name, target_modules=targets, seed=seed, summary=False, merge=None)
        for seed, name in enumerate("xy")
    }
    callbacks = [*(loras[name] for name in order), ModelCheckpoint(folder, save_last=True)]
    model = Turned(turned)
    toys.trainer(folder, callbacks, max_epochs=epochs).fit(model, loader(), ckpt_path=ckpt_path)
    return adapter_state_dict(model)


@pytest.mark.parametrize(("turned", "order"), [(True, "xy"), (False, "yx"), (True, "yx")])
def test_modules_and_callbacks_in_another_order(tmp_path: Path, turned: bool, order: str) -> None:
    run(tmp_path / "first", 1, False, "xy")
    whole = run(tmp_path / "whole", 2, False, "xy", tmp_path / "first" / "last.ckpt")
    other = run(tmp_path / "other", 2, turned, order, tmp_path / "first" / "last.ckpt")
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-6)
