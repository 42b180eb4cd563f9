"""A run never trains silently on nothing."""

from pathlib import Path
from typing import Any

import pytest
from helpers import toys
from helpers.toys import Toy, loader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRA


class WithUnused(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)


class Checkpointed(Toy):
    """The first layers lie in a reentrant checkpoint over inputs that need no gradient."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return self.net[self.first :](checkpoint(self.net[: self.first], x, use_reentrant=True))


def fit(tmp_path: Path, model: Toy, **settings: Any) -> None:
    toys.trainer(tmp_path, [LoRA(r=2, summary=False, **settings)], max_steps=2).fit(model, loader())


def test_adapters_that_are_not_used_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):  # torch's own: there is nothing to train
        fit(tmp_path, WithUnused(), target_modules=["unused"])


def test_adapters_that_a_reentrant_checkpoint_cuts_off(tmp_path: Path) -> None:
    model = Checkpointed(3)
    # The head trains in full, so that there is a loss to go back from, but no adapter lies on the way.
    with pytest.raises(RuntimeError, match="gave none of the 1 adapted layers a gradient"):
        fit(tmp_path, model, target_modules=["0"], modules_to_save=["net.6"])


def test_some_that_are_cut_off_or_not_used_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"gave 1 of 3 adapted layers no gradient, among them 'net\.0'"):
        fit(tmp_path, Checkpointed(3))
    with pytest.warns(UserWarning, match="gave 1 of 4 adapted layers no gradient, among them 'unused'"):
        fit(tmp_path, WithUnused())
