"""A run never trains silently on nothing."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.toys import Toy, loader, toy_net
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRA, LoraConfig, inject
from lightning_lora.trainer.gradient_checks import GradientWatch


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


def fit(
    tmp_path: Path,
    model: L.LightningModule,
    accumulated: int = 1,
    max_steps: int = 2,
    precision: Any = None,
    **settings: Any,
) -> None:
    toys.trainer(
        tmp_path,
        [LoRA(r=2, summary=False, **settings)],
        max_steps=max_steps,
        max_epochs=2 * accumulated,
        accumulate_grad_batches=accumulated,
        precision=precision,
    ).fit(model, loader())


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


class Gan(L.LightningModule):
    """Trains its discriminator first, as most do; ``cut`` forgets the generator's gradient."""

    def __init__(self, cut: bool = False, toggles: bool = False, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.cut, self.toggles, self.raw = cut, toggles, raw
        self.g, self.d = toy_net(), nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        generator, discriminator = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer, loss in ((discriminator, self.judge), (generator, self.fool)):
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(x, y))
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)

    def judge(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.d(self.g(x).detach()) - self.d(y)).mean()

    def fool(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.g(x)
        return -self.d(made.detach().requires_grad_() if self.cut else made).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.g.parameters(), 1e-3), torch.optim.Adam(self.d.parameters(), 1e-3)


@pytest.mark.parametrize("toggles", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_another_optimizer_may_go_first(tmp_path: Path, toggles: bool, raw: bool) -> None:
    model = Gan(toggles=toggles, raw=raw)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapted layers")
        fit(tmp_path, model, module="g", max_steps=8)
    with pytest.raises(RuntimeError, match="this step of Adam, backward passes gave none of the 3 adapted layers"):
        fit(tmp_path, Gan(cut=True, toggles=toggles, raw=raw), module="g")


class Warmup(Toy):
    """A head of its own, and the net waits for two steps in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        waits = self.way != "never" and (self.global_step < 2 or self.way == "always")
        if self.way == "freezes":
            for name, parameter in self.named_parameters():
                if "lora" in name:
                    parameter.requires_grad_(not waits)
            waits = False
        with torch.set_grad_enabled(torch.is_grad_enabled() and not waits):
            found = self.net(x)
        return self.head(found)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_part_may_train_alone_for_a_while(tmp_path: Path, accumulated: int) -> None:
    def found(way: str, max_steps: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, Warmup(way), accumulated, module="net", max_steps=max_steps)
        return [str(warning.message) for warning in caught if "adapted layers" in str(warning.message)]

    assert not found("freezes", 4)
    (first,) = found("no_grad", 4)
    assert "this step of AdamW, backward passes gave none of the 3 adapted" in first and "outside of them" in first
    first, last = found("always", 4)
    assert last.startswith("In the whole run, no backward pass gave any of the 3 adapted layers that AdamW holds")


def test_a_head_that_lora_trains_does_not_excuse_a_dead_adapter(tmp_path: Path) -> None:
    model = Warmup("always")
    with pytest.raises(RuntimeError, match=r"gave none of the 3 adapted.*freeze them for that time"):
        fit(tmp_path, model, target_modules=["net.0", "net.4", "net.6"], modules_to_save=["head"])
    assert model.trainer.global_step <= 1
    fit(tmp_path, Warmup("freezes"), target_modules=["net.0"], modules_to_save=["head"], max_steps=4)


class Skips(Toy):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx < 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_batches_may_be_skipped(tmp_path: Path, precision: str) -> None:
    fit(tmp_path, Skips(), max_steps=4, precision=precision)


def test_all_adapters_frozen_at_the_start(tmp_path: Path) -> None:
    class Freezes(Toy):
        def configure_optimizers(self) -> Any:
            for name, parameter in self.named_parameters():
                if "lora" in name:
                    parameter.requires_grad_(False)
            return super().configure_optimizers()

    with pytest.warns(UserWarning, match="No optimizer that configure_optimizers gives holds an adapter"):
        fit(tmp_path, Freezes(), target_modules=["net.0"], modules_to_save=["net.6"])


@pytest.mark.parametrize("when", ["__init__", "on_train_start"])
def test_optimizers_that_are_made_and_stepped_by_hand(tmp_path: Path, when: str) -> None:
    """Those of before the adapters hold what is frozen, which the warning is for."""

    class ByHand(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.parameters(), 0.1)

        def configure_optimizers(self) -> None:
            return

        def on_train_start(self) -> None:
            if when == "on_train_start":
                self.own = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.own.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.own.step()

    model = ByHand()
    base = toys.snapshot(model)
    with pytest.warns(UserWarning, match="trained only if one that you step yourself was made of them since"):
        fit(tmp_path, model, merge=None)
    assert model.net[6].lora["default"].lora_B.any() == (when == "on_train_start")
    toys.assert_same_tensors(toys.base_of(model, base), base)


def test_nothing_is_left_of_it_once_it_has_passed(tmp_path: Path) -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            assert trainer.callbacks[0]._watches.gradients is None
            assert not trainer.optimizers[0]._optimizer_step_post_hooks

    toys.trainer(tmp_path, [LoRA(r=2, summary=False), Looks()], max_steps=2).fit(Toy(), loader())
    model = Warmup("always")
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False, module="net")], max_steps=2)
    trainer.fit(model, loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


PLANS = st.lists(st.sampled_from(["nothing", "other", "adapter", "frozen"]), min_size=1, max_size=8)


@given(PLANS, st.integers(1, 3), st.booleans())
def test_it_ends_a_run_exactly_when_a_step_follows_backward_passes_that_missed(
    plan: list[str], accumulated: int, both: bool
) -> None:
    """Backward passes of several kinds, and a step of each optimizer after every few of them."""
    model = inject(nn.ModuleDict({"net": nn.Linear(2, 2)}), LoraConfig(r=1, target_modules=["net"]))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    other = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(other.parameters(), 1e-2), torch.optim.SGD(adapters, 1e-2)]
    if both:
        optimizers.append(torch.optim.SGD(adapters[:1], 1e-2))
    watch = GradientWatch(model, optimizers)
    reached = missed = raised = False
    for index, kind in enumerate(plan, 1):
        for parameter in adapters:
            parameter.requires_grad_(kind != "frozen")
        if kind != "nothing":
            out = model["net"](torch.ones(2)) if kind == "adapter" else torch.ones(2)
            other(out).sum().backward()
            watch.after_backward()
            reached, missed = reached or kind == "adapter", missed or kind == "other"
        if index % accumulated == 0:
            expected = missed and not reached and kind != "frozen"
            try:
                for optimizer in optimizers:
                    optimizer.step()
            except RuntimeError:
                raised = True
            assert raised == expected
            if raised:
                return
            missed = False
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert watch.is_over == reached
    watch.stop()
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in optimizers)
