"""What would train the frozen base is refused, and what moves it is found and named."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.distributed.processes import run_processes
from helpers.toys import Toy, loader, outputs
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import LoRA, LoraConfig, inject, load_adapter, load_from_checkpoint
from lightning_lora.trainer.base_changes import BaseWatch


def fit(tmp_path: Path, model: L.LightningModule, *callbacks: Any, **settings: Any) -> None:
    kept = ModelCheckpoint(tmp_path, save_last=True)
    lora = LoRA(**{"r": 2, "summary": False, **settings})
    toys.trainer(tmp_path, [lora, *callbacks, kept], max_epochs=3).fit(model, loader())


class TwoParts(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:6], self.net[6]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[0], optimizer)


@pytest.mark.parametrize("callback", [lambda: BackboneFinetuning(1), Unfreezes])
@pytest.mark.parametrize("first", [False, True])
def test_unfreezing_callbacks(tmp_path: Path, callback: Any, first: bool) -> None:
    lora = LoRA(r=2, summary=False)
    callbacks = [callback(), lora] if first else [lora, callback()]
    with pytest.raises(ValueError, match=rf"{type(callback()).__name__} unfreezes.*modules_to_save.*LoRA\(module="):
        toys.trainer(tmp_path, callbacks).fit(TwoParts(), loader())


def test_an_unfreezing_callback_beside_an_adapted_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BackboneFinetuning unfreezes"):
        fit(tmp_path, TwoParts(), BackboneFinetuning(1), module="backbone")
    model = TwoParts()
    head = model.backbone[0].weight.detach().clone()
    fit(tmp_path, model, Unfreezes(), module="head")
    assert not torch.equal(model.backbone[0].weight, head)


def test_a_group_of_the_base_that_is_added_in_fit(tmp_path: Path) -> None:
    model = TwoParts()
    base = model.backbone[0].weight.detach().clone()
    # Not known to be about the adapted part, so that it is found when it acts.
    with pytest.raises(ValueError, match=r"require gradients again.*'backbone\.0\.weight', 'backbone\.0\.bias'"):
        fit(tmp_path, model, Unfreezes(), module="backbone")
    assert model.trainer.current_epoch == 1
    assert torch.equal(model.backbone[0].weight, base)


def test_parameters_unfrozen_in_configure_optimizers(tmp_path: Path) -> None:
    class Thaws(Toy):
        def configure_optimizers(self) -> Any:
            self.net[1].requires_grad_(True)
            return super().configure_optimizers()

    model = Thaws()
    with pytest.raises(ValueError, match=r"'net\.1\.weight', 'net\.1\.bias'\. Name the modules in LoRA\(modules_to_s"):
        fit(tmp_path, model)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    fit(tmp_path, Thaws(), modules_to_save=["net.1"])


class RunningNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running.lerp_(x.detach().var(0), 0.1)
        return x / self.running.sqrt()


class Counter(nn.Module):
    """What it stores is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Any = {"calls": [0, 0.5], "codes": (torch.ones(2), "text", {1})}

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Any:
        return copy.deepcopy(self.count)

    def set_extra_state(self, state: Any) -> None:
        self.count = state


class Moves(Toy):
    """A part of it moves in one of the ways in which such parts do."""

    def __init__(self, way: str = "none") -> None:
        super().__init__()
        self.way = way
        self.part: nn.Module = nn.Linear(8, 8).requires_grad_(False)
        if way == "norm":
            self.part = RunningNorm()
        elif way == "grows":
            self.part.register_buffer("bank", torch.empty(0, 8))
        elif way == "spectral":
            self.part = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.part(batch[0])
        if self.way == "teacher":
            self.part.weight.data = 0.9 * self.part.weight.data + 0.1
        elif self.way == "teacher in place":
            self.part.weight.data.mul_(0.9).add_(0.1)
        elif self.way == "registered late":
            self.part.register_buffer("seen", batch[0].mean(0))
        elif self.way == "grows":
            self.part.bank = torch.cat([self.part.bank, batch[0]])
        elif self.way == "given up":
            self.part.bias = None
        elif self.way == "one code":
            with torch.no_grad():
                self.part.weight[3, 3] += 1
        return super().training_step(batch, batch_idx)

    def on_fit_start(self) -> None:
        if self.way == "late":
            nn.init.normal_(self.part.weight)


TARGETS = ["net.0", "net.4"]
WAYS = {
    "norm": "'part.running'",
    "spectral": "'part.parametrizations.weight.0._u', 'part.parametrizations.weight.0._v'",
    "teacher": "'part.weight'",
    "teacher in place": "'part.weight'",
    "one code": "'part.weight'",
    "late": "'part.weight'",
    "registered late": "'part.seen'",
    "grows": "'part.bank'",
    "given up": "'part.bias'",
}
OF_ANOTHER_SHAPE = {"late", "registered late", "grows", "given up"}


def moved_warnings(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "base has changed" in str(w.message) or "exported" in str(w.message)]


@pytest.mark.parametrize("way", WAYS)
def test_what_moves_is_named_once_and_not_exported(tmp_path: Path, way: str) -> None:
    model = Moves(way)
    first, last = moved_warnings(lambda: fit(tmp_path, model, export_dir=tmp_path / "out", target_modules=TARGETS))
    assert f"gives another model on the base than this one: {WAYS[way]}." in first.replace("they give", "gives")
    assert last.startswith("adapter/ is not exported, since it could not be opened on the base: 'part.")
    assert not (tmp_path / "out" / "adapter").exists()
    assert (tmp_path / "out" / "merged").exists()


@pytest.mark.parametrize("way", sorted(set(WAYS) - OF_ANOTHER_SHAPE))
def test_it_may_move_where_it_is_saved(tmp_path: Path, way: str) -> None:
    saved = {"modules_to_save": ["part"], "target_modules": TARGETS}
    if way != "spectral":  # its parameters are not those of a layer
        assert not moved_warnings(lambda: fit(tmp_path, Moves(way), export_dir=tmp_path / "out", **saved))
    assert not moved_warnings(lambda: fit(tmp_path, Moves(way), module="net"))
    saved["modules_to_save"] = WAYS[way].replace("'", "").split(", ")  # what the warning names
    assert not moved_warnings(lambda: fit(tmp_path, Moves(way), export_dir=tmp_path / "named", **saved))
    assert load_file(tmp_path / "named" / "adapter" / "adapter_model.safetensors")


def test_a_base_that_stands(tmp_path: Path) -> None:
    for init in (True, "pissa"):
        model, out = Toy(), tmp_path / str(init)
        settings = {"export_dir": out, "target_modules": TARGETS}
        assert not moved_warnings(lambda m=model, s=settings, i=init: fit(tmp_path, m, **s, init_lora_weights=i))
        fresh = Toy()
        load_adapter(fresh, out / "adapter")
        torch.testing.assert_close(outputs(fresh), outputs(model), rtol=1e-4, atol=1e-5)


def test_the_callback_is_copied_in_fit_without_it(tmp_path: Path) -> None:
    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            state = trainer.callbacks[0].__reduce__()[2]
            assert trainer.callbacks[0]._watches.base is not None and state["_watches"] == type(state["_watches"])()

    fit(tmp_path, Toy(), Copies())


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([(), (1,), (7,), (64, 33), (5, 2048), (3, 4, 5, 6), (2, 9000)]))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 3)))) * 3
    tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()) and tensor.dim() == 2:
        tensor = tensor.t()
    if draw(st.booleans()) and tensor.dim():
        tensor = tensor[1:] if len(tensor) > 1 else tensor
    return tensor


def flipped(value: Tensor) -> Tensor:
    return ~value if value.dtype == torch.bool else value + 1


def one_value(tensor: Tensor, where: int) -> None:
    index = torch.unravel_index(torch.tensor(where % tensor.numel()), tensor.shape)
    tensor[index] = flipped(tensor[index])


WRITES: dict[str, Callable[[nn.Module, int], Any]] = {
    "in place": lambda m, i: m.tensor.copy_(flipped(m.tensor)),
    "one": lambda m, i: one_value(m.tensor, i),
    "through data": lambda m, i: m.tensor.data.copy_(flipped(m.tensor)),
    "other data": lambda m, i: setattr(m.tensor, "data", flipped(m.tensor)),
    "another": lambda m, i: setattr(m, "tensor", flipped(m.tensor)),
    "another shape": lambda m, i: setattr(m, "tensor", m.tensor[None]),
    "rows": lambda m, i: m.tensor.copy_(m.tensor.flip(0) if m.tensor.dim() else m.tensor),
    "same": lambda m, i: m.tensor.copy_(m.tensor.clone()),
    "same, elsewhere": lambda m, i: setattr(m, "tensor", m.tensor.clone()),
    "nothing": lambda m, i: None,
}


@given(tensors(), st.lists(st.tuples(st.sampled_from(sorted(WRITES)), st.integers(0, 20000)), max_size=3))
def test_it_names_exactly_what_has_other_values(tensor: Tensor, writes: list[tuple[str, int]]) -> None:
    assume(not tensor.isnan().any())
    module = nn.Module()
    module.register_buffer("tensor", tensor)
    module.register_buffer("other", torch.ones(3))
    model = inject(nn.ModuleDict({"net": nn.Linear(2, 2), "part": module}), LoraConfig(r=1, target_modules=["net"]))
    watch = BaseWatch(model, [])
    before = tensor.clone()
    for kind, where in writes:
        with torch.no_grad():
            WRITES[kind](module, where)
        expected = [] if torch.equal(module.tensor, before) else ["part.tensor"]
        assert watch.moved() == expected
        assert watch.moved(thoroughly=True) == expected


@given(before=st.none() | tensors(), after=st.none() | tensors())
def test_it_names_what_comes_grows_and_goes(before: Tensor | None, after: Tensor | None) -> None:
    module = nn.Module()
    module.register_buffer("tensor", before)
    model = inject(nn.ModuleDict({"net": nn.Linear(2, 2), "part": module}), LoraConfig(r=1, target_modules=["net"]))
    watch = BaseWatch(model, [])
    module.tensor = after
    one, two = (None if tensor is None or not tensor.numel() else tensor for tensor in (before, after))
    same = one is two or (one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two))
    for thoroughly in (True, False):
        assert watch.moved(thoroughly) == ([] if same else ["part.tensor"])


STATES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.text(max_size=2) | st.integers(0, 2).map(torch.tensor),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


def equal(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


@given(before=STATES, after=STATES)
def test_what_is_stored_beside_tensors_is_named(before: Any, after: Any) -> None:
    part = Counter()
    part.count = before
    model = inject(nn.ModuleDict({"net": nn.Linear(2, 2), "part": part}), LoraConfig(r=1, target_modules=["net"]))
    watch = BaseWatch(model, [])
    assert not moved_warnings(watch.warn_of_moved)
    part.count = after
    said = moved_warnings(watch.warn_of_moved)
    assert ["'part._extra_state'" in each for each in said] == ([] if equal(before, after) else [True])
    assert not moved_warnings(watch.warn_of_moved)


def test_what_is_stored_beside_tensors_is_saved_with_modules_to_save(tmp_path: Path) -> None:
    class Counts(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.part = Counter()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.part.count["calls"][0] += 1
            return super().training_step(batch, batch_idx)

    (said,) = moved_warnings(lambda: fit(tmp_path, Counts(), export_dir=tmp_path / "out", target_modules=TARGETS))
    assert "'part._extra_state'" in said and (tmp_path / "out" / "adapter").exists()
    model = Counts()
    settings = {"modules_to_save": ["net.1", "part"], "target_modules": TARGETS, "merge": None}
    assert not moved_warnings(lambda: fit(tmp_path / "saved", model, **settings))
    assert (
        load_from_checkpoint(Counts, tmp_path / "saved" / "last.ckpt").part.count["calls"][0]
        == model.part.count["calls"][0]
        > 0
    )


@given(st.integers(0, 64 * 64 - 1))
def test_one_value_written_behind_torchs_back_is_found_at_the_end(where: int) -> None:
    model = inject(nn.Sequential(nn.Linear(2, 2), nn.Linear(64, 64)), LoraConfig(r=1, target_modules=["0"]))
    watch = BaseWatch(model, [])
    model[1].weight.data.view(-1)[where] += 1
    assert watch.moved(thoroughly=True) == ["1.weight"]


def test_rows_that_change_places_are_found() -> None:
    model = inject(nn.ModuleDict({"net": nn.Linear(2, 2), "part": nn.BatchNorm1d(2)}), LoraConfig(r=1))
    model["part"].register_buffer("codes", torch.zeros(2, 8192, dtype=torch.float64))
    model["part"].codes[0, 1] = 1  # not among the values that are always looked at
    watch = BaseWatch(model, [])
    model["part"].codes.copy_(model["part"].codes.flip(0))
    assert watch.moved() == ["part.codes"]


def test_it_is_named_at_the_first_save_after_it_moved(tmp_path: Path) -> None:
    class Breaks(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise ZeroDivisionError("on purpose")

    def run() -> None:
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, Moves("teacher"), Breaks(), target_modules=TARGETS)

    (only,) = moved_warnings(run)
    assert "'part.weight'" in only


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2", "tp"])
@pytest.mark.parametrize("moves", [True, False])
def test_where_processes_share_the_model(strategy: str, moves: bool, tmp_path: Path) -> None:
    first, last = run_processes("jobs.base_moved", str(tmp_path), strategy, moves)
    assert bool(first["said"]) == bool(last["wrote"]) == moves
    assert all(name in said for name in last["wrote"] for said in first["said"])
    assert first["exported"] != moves
