"""A run goes on from any moment at which it was saved, and ends with the bits of the run that was not stopped."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers.moments import ByHand, Noisy, SaveAt, Setup, difference, kind_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_lora.trainer.resume import settle


def differences(setup: Setup, folder: Path, kinds: Any = SaveAt.KINDS, every: int = 1) -> tuple[int, dict[str, str]]:
    """How many moments of a run were resumed from, and what differed for which."""
    whole = setup.run(folder / "whole", kinds=kinds)
    steps = whole[1].global_step, whole[1].fit_loop.total_batch_idx
    found, saved = {}, list(whole[3].items())
    for path, at in saved[::every]:
        if kind_of(path) == "epoch_end" and steps[1] == int(path.stem.split("-")[2]):
            continue  # nothing is left to do
        what = difference(setup.run(folder / "resumed", path), whole, at, kind_of(path))
        if what is not None:
            found[path.name] = what
    assert saved
    return len(saved), found


KINDS_OF_RUN = {
    "no validation": Setup(trainer={"limit_val_batches": 0, "max_epochs": 2}),
    "validation in the epoch": Setup(trainer={"val_check_interval": 3, "max_epochs": 2}),
    "validation by share, in accumulation": Setup(
        trainer={"val_check_interval": 0.5, "accumulate_grad_batches": 3, "max_epochs": 2}
    ),
    "validation across epochs": Setup(
        trainer={"val_check_interval": 10, "check_val_every_n_epoch": None, "max_epochs": 2}
    ),
    "validation every second epoch": Setup(scheduler="val", trainer={"check_val_every_n_epoch": 2}),
    "a scheduler that follows a metric": Setup(scheduler="train", trainer={"max_epochs": 2}),
    "steps that end in an epoch": Setup(trainer={"max_steps": 11, "max_epochs": -1, "accumulate_grad_batches": 1}),
    "steps and epochs": Setup(trainer={"max_steps": 7, "max_epochs": 3, "accumulate_grad_batches": 2}),
    "a generator of the loader's own": Setup(data="generator", trainer={"val_check_interval": 4, "max_epochs": 2}),
    "rows augmented in this process": Setup(data="epochs", augmented=True, trainer={"max_epochs": 2}),
    "part of the batches": Setup(data="epochs", trainer={"limit_train_batches": 5, "max_epochs": 2}),
    "a callback draws as the epoch starts": Setup(draws_in="on_train_epoch_start", trainer={"max_epochs": 2}),
    "accumulation by epoch": Setup(accumulation={0: 3, 1: 2}, trainer={"accumulate_grad_batches": 1, "max_epochs": 2}),
    "optimized by hand": Setup(module=ByHand, trainer={"val_check_interval": 4, "max_epochs": 2}),
    "no sanity check": Setup(trainer={"num_sanity_val_steps": 0, "max_epochs": 2}),
}


@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_from_moments_of_every_kind(tmp_path: Path, kind: str) -> None:
    """Every fifth moment here, all of them in the slow test below."""
    assert differences(KINDS_OF_RUN[kind], tmp_path, every=5)[1] == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_from_every_moment(tmp_path: Path, kind: str) -> None:
    assert differences(KINDS_OF_RUN[kind], tmp_path)[1] == {}


def test_with_workers_that_augment(tmp_path: Path) -> None:
    setup = Setup(workers=2, augmented=True, trainer={"val_check_interval": 4, "max_epochs": 2})
    assert differences(setup, tmp_path, every=12)[1] == {}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_that_was_only_fetched_is_not_lost(tmp_path: Path, accumulate: int) -> None:
    trainer = {"val_check_interval": 3, "max_epochs": 2, "accumulate_grad_batches": accumulate}
    setup = Setup(data="epochs", validation_draws=False, trainer=trainer)
    assert differences(setup, tmp_path, kinds=("batch_start",), every=3)[1] == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_at_an_epoch_s_end_with_a_plain_shuffling_loader(tmp_path: Path, workers: int) -> None:
    setup = Setup(data="plain", workers=workers, augmented=True, trainer={"val_check_interval": 4})
    assert differences(setup, tmp_path, kinds=("epoch_end",))[1] == {}
    assert differences(Setup(data="plain", trainer={"max_steps": 20}), tmp_path, kinds=("epoch_end",))[1] == {}


KEEPS: dict[str, dict[str, Any]] = {
    "of steps": {"every_n_train_steps": 1},
    "of the best validation": {"monitor": "val_loss", "save_on_train_epoch_end": False},
    "of an epoch's end": {"monitor": "val_loss", "save_on_train_epoch_end": True},
    "of steps, by a metric of validation": {"monitor": "val_loss", "every_n_train_steps": 3},
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("interval", [4, 8])
def test_from_what_modelcheckpoint_keeps(tmp_path: Path, keep: str, interval: int) -> None:
    setup = Setup(trainer={"val_check_interval": interval, "max_epochs": 2, "enable_checkpointing": True})

    def run(folder: Path, ckpt_path: Path | None = None) -> Any:
        kept = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_last=True, **KEEPS[keep])
        return setup.run(folder, ckpt_path, callbacks=[kept])

    whole = run(tmp_path / "whole")
    paths = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(paths) > 1
    for path in [*paths[::5], tmp_path / "whole" / "last.ckpt"]:
        resumed = run(tmp_path / "resumed", path)
        assert difference(resumed, whole, len(whole[2]) - len(resumed[2])) is None, path.name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_in_an_epoch_by_its_steps_goes_on_in_that_epoch(tmp_path: Path, accumulate: int) -> None:
    """Lightning alone ends the epoch there, trains one more batch of it, and begins the next one."""
    trainer = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "val_check_interval": 4}
    whole = Setup(trainer=trainer).run(tmp_path / "whole")
    stopped = Setup(trainer=trainer | {"max_steps": 11 // accumulate}).run(tmp_path, kinds=("epoch_end",))
    stopped[1].save_checkpoint(tmp_path / "after-fit-0.ckpt")
    for path in (list(stopped[3])[-1], tmp_path / "after-fit-0.ckpt"):
        resumed = Setup(trainer=trainer).run(tmp_path / "resumed", path)
        assert difference(resumed, whole, len(whole[2]) - len(resumed[2])) is None
        assert len(resumed[2]) == len(whole[2]) - len(stopped[2])


class Signal(Callback):
    """Send this process the requeue signal in the middle of a step."""

    def __init__(self, batch: int, in_validation: bool = False) -> None:
        self.batch, self.in_validation, self.saved_at = batch, in_validation, -1

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and not self.in_validation:
            self.send(trainer)

    def on_validation_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and self.in_validation:
            self.send(trainer)

    def send(self, trainer: Any) -> None:
        if self.saved_at >= 0:
            return
        self.saved_at = len(trainer.logger.lines)
        os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(("batch", "in_validation"), [(2, False), (4, False), (3, True), (7, True), (15, False)])
def test_a_requeued_job_loses_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, in_validation: bool
) -> None:
    requeue = tmp_path / "scontrol"
    requeue.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")
    requeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = signal.getsignal(signal.SIGUSR1)
    setup = Setup(trainer={"val_check_interval": 4, "max_epochs": 2, "accumulate_grad_batches": 3})
    plugins, sent = [SLURMEnvironment(auto_requeue=True)], Signal(batch, in_validation)
    whole = setup.run(tmp_path, callbacks=[sent], plugins=plugins)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert signal.getsignal(signal.SIGUSR1) == before
    resumed = setup.run(tmp_path / "resumed", tmp_path / "hpc_ckpt_1.ckpt")
    assert difference(resumed, whole, sent.saved_at) is None


def test_another_version_of_lightning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_TrainingEpochLoop, "_should_check_val_fx")
    with pytest.raises(RuntimeError, match="no _should_check_val_fx.* made for Lightning 2.6"):
        Setup().run(tmp_path)
    with pytest.raises(RuntimeError, match="progress has no epoch_progress.* made for Lightning 2.6"):
        settle({"loops": {"fit_loop": {}}})


RUNS = st.builds(
    Setup,
    data=st.sampled_from(["shuffle", "generator", "epochs"]),
    workers=st.sampled_from([0, 0, 0, 0, 1]),
    augmented=st.booleans(),
    dropout=st.sampled_from([0.0, 0.2]),
    validation_draws=st.booleans(),
    draws_in=st.sampled_from([None, "on_train_epoch_start", "on_train_start", "on_fit_start"]),
    scheduler=st.sampled_from(["step", "val", "train"]),
    trainer=st.fixed_dictionaries(
        {
            "max_epochs": st.sampled_from([2, 3]),
            "accumulate_grad_batches": st.integers(1, 4),
            "num_sanity_val_steps": st.sampled_from([0, 2]),
            "limit_train_batches": st.sampled_from([1.0, 5]),
        },
        optional={"max_steps": st.integers(1, 20)},
    ),
)
VALIDATIONS = st.one_of(
    st.fixed_dictionaries({"val_check_interval": st.sampled_from([1, 3, 5, 0.5, 1.0])}),
    st.fixed_dictionaries({"val_check_interval": st.integers(1, 12), "check_val_every_n_epoch": st.none()}),
    st.fixed_dictionaries({"check_val_every_n_epoch": st.integers(1, 3)}),
    st.just({"limit_val_batches": 0}),
)


def check(setup: Setup, validation: dict[str, Any], kind: str, which: float) -> None:
    # What has been drawn for the rows of a batch that is not done is drawn again.
    setup.augmented = setup.augmented and kind != "batch_start"
    setup.trainer.update(validation)
    with tempfile.TemporaryDirectory() as folder:
        whole = setup.run(Path(folder), kinds=(kind,))
        trained = whole[1].fit_loop.total_batch_idx
        saved = [(p, n) for p, n in whole[3].items() if kind != "epoch_end" or int(p.stem.split("-")[2]) < trained]
        if saved:
            path, at = saved[int(which * len(saved))]
            assert difference(setup.run(Path(folder) / "resumed", path), whole, at, kind) is None, path.name


DRAWS = {
    "setup": RUNS,
    "validation": VALIDATIONS,
    "kind": st.sampled_from(("batch_start", *SaveAt.KINDS)),
    "which": st.floats(0, 1, exclude_max=True),
}
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@settings(max_examples=25, derandomize=True, **QUIET)  # type: ignore[arg-type]
@given(**DRAWS)
def test_any_run_from_any_moment(**drawn: Any) -> None:
    check(**drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=800, **QUIET)  # type: ignore[arg-type]
@given(**DRAWS)
def test_many_runs_from_any_moment(**drawn: Any) -> None:
    check(**drawn)


class SaveOnce(Callback):
    """Saves in one of its hooks, when that is called for the nth time."""

    def __init__(self, hook: str, path: Path, nth: int) -> None:
        self.path, self.left = path, nth
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def undrawn() -> Noisy:
    """In the middle of a step, numbers have been drawn that are drawn again."""
    model = Noisy()
    model.net[3].p = 0.0
    return model


@settings(max_examples=15, derandomize=True, **QUIET)  # type: ignore[arg-type]
@given(
    hook=st.sampled_from(["before_backward", "after_backward", "before_zero_grad", "before_optimizer_step"]),
    data=st.sampled_from(["shuffle", "generator", "epochs"]),
    accumulate=st.integers(1, 4),
    nth=st.integers(1, 9),
)
@example(hook="after_backward", data="epochs", accumulate=3, nth=2)
@example(hook="before_optimizer_step", data="generator", accumulate=4, nth=2)
def test_in_the_middle_of_a_step(hook: str, data: str, accumulate: int, nth: int) -> None:
    """What had been accumulated is so once, also where the batch's own gradient was in it when the run was saved."""
    setup = Setup(data, dropout=0.0, trainer={"accumulate_grad_batches": accumulate, "max_epochs": 2})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in_step.ckpt"
        whole = setup.run(Path(folder), model=undrawn(), callbacks=[SaveOnce(f"on_{hook}", path, nth)])
        if path.exists():
            resumed = setup.run(Path(folder) / "resumed", path, model=undrawn())
            logged = resumed[2][-3:], whole[2][-3:]
            assert logged[0] == logged[1] and difference(resumed, (*whole[:2], resumed[2], {}), 0) is None
