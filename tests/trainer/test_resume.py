"""A run that was stopped and resumed ends with the very bits of the run that was not."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, TESTS, toys
from helpers.resuming import ResumableLoader, Scheduled, assert_same_run, train
from helpers.toys import Toy, assert_same_tensors, loader
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRA, adapter_state_dict, unmerge
from lightning_lora.trainer.resume import settle


def test_with_nothing_but_plain_types(tmp_path: Path) -> None:
    """The file resumes under ``weights_only=True`` too."""
    whole = train(tmp_path / "whole", ResumableLoader(), keep={"every_n_train_steps": 1})
    path = tmp_path / "whole" / "step=13.ckpt"
    model, trainer = Scheduled(), toys.trainer(tmp_path, [LoRA(r=2, lora_dropout=0.2, summary=False)], max_epochs=4)
    trainer.fit(model, ResumableLoader(), ckpt_path=path, weights_only=True)
    assert_same_tensors(adapter_state_dict(unmerge(model)), adapter_state_dict(whole[0]))


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_between_epochs_with_a_plain_shuffling_loader(tmp_path: Path, epoch: int) -> None:
    keep = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    whole = train(tmp_path / "whole", loader(shuffle=True), keep=keep)
    resumed = train(
        tmp_path / "resumed",
        loader(shuffle=True),
        keep=keep,
        seed=999,
        ckpt_path=tmp_path / "whole" / f"step={4 * epoch}.ckpt",
    )
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 3, 6, 13])
def test_in_the_middle_of_an_epoch_with_a_resumable_loader(tmp_path: Path, step: int, accumulate: int) -> None:
    keep = {"every_n_train_steps": 1}
    settings = {"accumulate_grad_batches": accumulate, "keep": keep}
    whole = train(tmp_path / "whole", ResumableLoader(), **{**settings, "keep": dict(keep)})
    resumed = train(
        tmp_path / "resumed",
        ResumableLoader(),
        **{**settings, "keep": dict(keep)},
        seed=999,
        ckpt_path=tmp_path / "whole" / f"step={step}.ckpt",
    )
    assert_same_run(resumed, whole)


def test_a_stopped_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    keep = {"every_n_train_steps": 1}
    whole = train(tmp_path / "whole", ResumableLoader(), keep=dict(keep))
    train(tmp_path / "part", ResumableLoader(), keep=dict(keep), stop=11)
    resumed = train(
        tmp_path / "resumed", ResumableLoader(), keep=dict(keep), seed=3, ckpt_path=tmp_path / "part" / "step=11.ckpt"
    )
    assert_same_run(resumed, whole)


def test_the_same_trainer_resumes_its_merged_model(tmp_path: Path) -> None:
    """``fit`` merges; ``fit(ckpt_path="last")`` with the same model goes on from the checkpoint, on the bare base."""
    torch.manual_seed(0)
    model = Toy(dropout=0.0)
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False), ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader(), ckpt_path="last")
    whole = Toy(dropout=0.0)
    toys.trainer(tmp_path / "whole", [LoRA(r=2, summary=False)], max_epochs=4).fit(whole, loader())
    assert trainer.global_step == 16
    assert_same_tensors(model.state_dict(), whole.state_dict())
    assert_same_tensors(unmerge(model).state_dict(), unmerge(whole).state_dict())


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            from pathlib import Path
            sys.path.insert(0, {str(TESTS)!r})
            import lightning as L
            from helpers import resuming

            class Kill(resuming.Scheduled):
                def training_step(self, batch, batch_idx):
                    if self.global_step == 13:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return super().training_step(batch, batch_idx)

            resuming.Scheduled = Kill
            resuming.train(Path({str(tmp_path / "killed")!r}), resuming.ResumableLoader(),
                           keep={{"every_n_train_steps": 3}})
            """
        )
    )
    done = subprocess.run([sys.executable, script], timeout=120, capture_output=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    last = max((tmp_path / "killed").glob("*.ckpt"), key=os.path.getmtime)
    assert last.name == "step=12.ckpt"
    keep = {"every_n_train_steps": 3}
    resumed = train(tmp_path / "resumed", ResumableLoader(), keep=dict(keep), seed=5, ckpt_path=last)
    assert_same_run(resumed, train(tmp_path / "whole", ResumableLoader(), keep=dict(keep)))


def counts(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def saved_at(
    epoch: tuple[int, int, int, int],
    batch: tuple[int, int, int, int],
    is_last: bool = False,
    validation: tuple[int, int, int, int] = (4, 4, 4, 4),
    loaders: list[Any] | None = None,
    **saved: Any,
) -> dict[str, Any]:
    """A checkpoint whose progress is given: ready, started, processed and completed of each loop."""
    progress = {
        "epoch_progress": {"total": counts(*epoch), "current": counts(*epoch)},
        "epoch_loop.batch_progress": {
            "total": counts(*(10 + n for n in batch)), "current": counts(*batch), "is_last_batch": is_last,
        },
        "epoch_loop.val_loop.batch_progress": {"total": counts(*validation), "current": counts(*validation)},
        "state_dict": {} if loaders is None else {"combined_loader": loaders},
    }  # fmt: skip
    return {"lightning_lora": {"rng": saved}, "loops": {"fit_loop": progress}}


MOMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an epoch has ended, and schedulers follow": (
        saved_at((2, 2, 2, 1), (4, 4, 4, 4), is_last=True),
        {"follows": True, "validated": True, "epoch_ends": True, "plateau_due": True, "done": (2, 2, 4)},
    ),
    "an epoch has ended, with all that follows": (
        saved_at((2, 2, 2, 2), (4, 4, 4, 4), is_last=True),
        {"follows": True, "validated": True, "epoch_ends": True, "done": (2, 2, 4)},
    ),
    "an epoch is about to begin": (
        saved_at((3, 2, 2, 2), (0, 0, 0, 0)),
        {"validated": True, "done": (2, 2, 0)},
    ),
    "a step was made": (
        saved_at((2, 2, 1, 1), (3, 3, 3, 2)),
        {"in_epoch": True, "follows": True, "done": (2, 1, 3)},
    ),
    "what follows a step was done too": (
        saved_at((2, 2, 1, 1), (3, 3, 3, 3)),
        {"in_epoch": True, "follows": True, "validated": True, "done": (2, 1, 3)},
    ),
    "a batch was fetched": (
        saved_at((2, 2, 1, 1), (3, 2, 2, 2)),
        {"in_epoch": True, "validated": True, "done": (2, 1, 2)},
    ),
    "in a validation": (
        saved_at((2, 2, 1, 1), (3, 3, 3, 3), validation=(5, 5, 5, 5), in_validation=True),
        {"in_epoch": True, "follows": True, "done": (2, 1, 3)},
    ),
    "in a validation, by version 0.1": (
        saved_at((2, 2, 1, 1), (3, 3, 3, 3), validation=(6, 6, 5, 5)),
        {"in_epoch": True, "follows": True, "done": (2, 1, 3)},
    ),
    "max_steps has ended an epoch early": (
        saved_at((2, 2, 2, 1), (2, 2, 2, 2)),
        {"in_epoch": True, "validated": True, "done": (2, 1, 2)},
    ),
    "an epoch was ended early by its own": (
        saved_at((2, 2, 2, 1), (2, 2, 2, 2), stopped_in_epoch=False),
        {"follows": True, "validated": True, "plateau_due": True, "done": (2, 2, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOMENTS)
def test_a_moment_is_found_by_its_progress(name: str) -> None:
    checkpoint, expected = copy.deepcopy(MOMENTS[name])
    begun, ended, batches = expected.pop("done")
    moment = settle(checkpoint)
    nothing = {"in_epoch": False, "follows": False, "validated": False, "epoch_ends": False, "plateau_due": False,
               "stateful": False, "batches": None, "metrics": None, "state": None, "accumulate": None}  # fmt: skip
    assert vars(moment) == nothing | expected
    progress = checkpoint["loops"]["fit_loop"]
    for each in ("total", "current"):
        assert progress["epoch_progress"][each] == counts(begun, begun, ended, ended)
        done = batches + 10 * (each == "total")
        assert progress["epoch_loop.batch_progress"][each] == counts(done, done, done, done)
        validation = progress["epoch_loop.val_loop.batch_progress"][each]
        assert len(set(validation.values())) == 1


def test_each_rank_goes_on_with_its_own() -> None:
    states = [{"loaders": [{"at": rank}], "gradients": {}} for rank in range(2)]
    saved = {"states": states, "batches": 7, "metrics": {"loss": torch.ones(())}}
    checkpoint = saved_at((2, 2, 1, 1), (3, 3, 3, 3), loaders=[{"at": 0}], **saved)
    moment = settle(copy.deepcopy(checkpoint), rank=1, world_size=2)
    assert (moment.state, moment.batches, moment.stateful) == (states[1], 7, True)
    assert moment.metrics is not None
    assert moment.metrics["loss"] == 1
    settled = copy.deepcopy(checkpoint)
    settle(settled, rank=1, world_size=2)
    assert settled["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"at": 1}]
    alone = copy.deepcopy(checkpoint)
    assert settle(alone).state is None  # of two processes, and here is one
    assert alone["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"at": 0}]


def test_a_fetched_batch_is_put_back_into_loaders_of_ours_alone() -> None:
    ours = {"lightning_lora": 1, "taken": 3}
    loaders = [ours, {"lightning_lora": 1, "taken": 0}, {"taken": 3}, 5]
    for fetched, taken in ((3, 2), (2, 3)):
        checkpoint = saved_at((2, 2, 1, 1), (fetched, 2, 2, 2), loaders=copy.deepcopy(loaders))
        settle(checkpoint)
        found = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert found == [{**ours, "taken": taken}, *loaders[1:]]
    settle(saved_at((2, 2, 1, 1), (3, 2, 2, 2)))  # of loaders that keep no position
