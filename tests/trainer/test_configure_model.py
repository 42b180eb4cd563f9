"""When adapters come into a module that ``configure_model`` builds, and shards."""

from pathlib import Path
from typing import Any

import pytest
from helpers.toys import Toy, loader, toy_net, trainer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoRA, adapters


class Built(Toy):
    """Tells which adapters are there when it would share its parameters."""

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.name, self.fails, self.found = name, fails, []

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = toy_net(0, 0.1)
            assert getattr(self, self.name)("given", more=1) == "returned"

    def shard(self, one: str, more: int) -> str:
        return self._share(one, more)

    def split(self, one: str, more: int) -> str:
        return self._share(one, more)

    def _share(self, one: str, more: int) -> str:
        assert (one, more) == ("given", 1)
        self.found.append(sorted(adapters(self)))
        if self.fails:
            raise OSError("no room")
        return "returned"


def callbacks(number: int) -> list[Any]:
    return [LoRA(r=2, adapter_name=f"a{index}", summary=False, merge=None) for index in range(number)]


@given(st.sampled_from(["shard", "split"]), st.integers(1, 2))
def test_adapters_are_there_before_a_method_of_that_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, number: int
) -> None:
    model = Built(name)
    trainer(tmp_path_factory.mktemp("run"), callbacks(number), max_steps=1).fit(model, loader())
    names = [f"a{index}" for index in range(number)]
    assert model.found == [names if name == "shard" else []]
    assert sorted(adapters(model)) == names
    assert "shard" not in vars(model)


def test_a_module_that_fails_there_keeps_its_method(tmp_path: Path) -> None:
    model = Built("shard", fails=True)
    with pytest.raises(OSError, match="no room"):
        trainer(tmp_path, callbacks(1), max_steps=1).fit(model, loader())
    assert "shard" not in vars(model)
