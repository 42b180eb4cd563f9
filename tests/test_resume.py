"""A run that was stopped and resumed ends with the very bits of the run that was not."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Toy, assert_same_tensors, dataset, loader

from lightning_lora import LoRA, adapter_state_dict, unmerge


class ResumableLoader:
    """A shuffling loader with the ``state_dict`` interface, by which Lightning goes on in the middle of an epoch."""

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size, self.position, self.order = batch_size, 0, torch.empty(0, dtype=torch.long)
        self.resuming = False

    def __len__(self) -> int:
        return len(dataset()) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        if not self.resuming:
            self.order, self.position = torch.randperm(len(dataset())), 0
        self.resuming = False
        while self.position < len(self):
            rows = self.order[self.position * self.batch_size :][: self.batch_size]
            self.position += 1
            yield [tensor[rows] for tensor in dataset().tensors]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position, self.resuming = state["order"], state["position"], True


def train(path: Path, data: Any, *, ckpt_path: Any = None, stop: int = -1, seed: int = 1, **kw: Any) -> Any:
    """Train with dropout in the model and in the adapter; return the model with its adapter, and the Trainer."""
    torch.manual_seed(seed)
    model = Scheduled()
    lora = LoRA(r=2, lora_dropout=0.2, summary=False, merge=None)
    keep = ModelCheckpoint(path, filename="{step}", save_top_k=-1, **kw.pop("keep"))
    trainer = toys.trainer(path, [lora, keep], max_epochs=4, max_steps=stop, **kw)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


class Scheduled(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        assert self.trainer.estimated_stepping_batches  # which makes the loader before the progress is restored
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def assert_same_run(resumed: Any, whole: Any) -> None:
    assert_same_tensors(adapter_state_dict(resumed[0]), adapter_state_dict(whole[0]))
    assert resumed[1].global_step == whole[1].global_step
    for one, other in zip(resumed[1].optimizers[0].state.values(), whole[1].optimizers[0].state.values(), strict=True):
        assert_same_tensors(one, other)
    assert resumed[1].optimizers[0].param_groups[0]["lr"] == whole[1].optimizers[0].param_groups[0]["lr"]


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
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import lightning as L
            import test_resume

            class Kill(test_resume.Scheduled):
                def training_step(self, batch, batch_idx):
                    if self.global_step == 13:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return super().training_step(batch, batch_idx)

            test_resume.Scheduled = Kill
            test_resume.train(Path({str(tmp_path / "killed")!r}), test_resume.ResumableLoader(),
                              keep={{"every_n_train_steps": 3}})
            """
        )
    )
    done = subprocess.run([sys.executable, script], timeout=120, capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    last = max((tmp_path / "killed").glob("*.ckpt"), key=os.path.getmtime)
    assert last.name == "step=12.ckpt"
    keep = {"every_n_train_steps": 3}
    resumed = train(tmp_path / "resumed", ResumableLoader(), keep=dict(keep), seed=5, ckpt_path=last)
    assert_same_run(resumed, train(tmp_path / "whole", ResumableLoader(), keep=dict(keep)))
