"""A run that was stopped and resumed ends with the very bits of the run that was not."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TESTS, toys
from helpers.resuming import ResumableLoader, Scheduled, assert_same_run, train
from helpers.toys import Toy, assert_same_tensors, loader
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRA, adapter_state_dict, unmerge


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
