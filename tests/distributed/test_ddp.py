"""Two real processes with gloo, beside one process on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from toys import Toy, assert_adapter_only, inputs, snapshot

from lightning_lora import LoRA, load_from_checkpoint

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, toys
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_lora import LoRA

torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # ranks that agree do so by the seed of the adapter alone
model = toys.Toy(dropout=0.0)
callbacks = [LoRA({settings}), ModelCheckpoint({path!r}, save_last=True)]
trainer = toys.trainer({path!r}, callbacks, devices=2, strategy="ddp")
trainer.fit(model, toys.loader(batch_size=4))
torch.save(model.state_dict(), os.path.join({path!r}, f"merged-{{trainer.global_rank}}.pt"))
"""


def launch(path: Path, settings: str) -> str:
    """Train with ``LoRA(<settings>)`` in two processes; return what they print."""
    script = path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), path=str(path), settings=settings))
    # Without the seed that a test before may have set, which Lightning's sampler would take.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("ddp")
    return path, launch(path, "r=2")


def assert_as_one_process(path: Path, single_path: Path, **settings: Any) -> None:
    ranks = [torch.load(path / f"merged-{rank}.pt") for rank in range(2)]
    toys.assert_same_tensors(*ranks)
    single = Toy(dropout=0.0)
    # Lightning deals the rows of one shuffled order out in turn, so that these are the global batches.
    order = DistributedSampler(toys.dataset(), num_replicas=1, rank=0, shuffle=True)
    batches = DataLoader(toys.dataset(), batch_size=8, sampler=order)
    toys.trainer(single_path, [LoRA(**settings, summary=False)]).fit(single, batches)
    assert ranks[0].keys() == single.state_dict().keys()
    for name, tensor in single.state_dict().items():
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ranks[0]["net.0.weight"], Toy().net[0].weight)


def test_both_processes_end_with_the_weights_of_one(run: tuple[Path, str], tmp_path: Path) -> None:
    assert_as_one_process(run[0], tmp_path, r=2)


def test_vera_in_two_processes(tmp_path: Path) -> None:
    """Each process draws the shared pair by itself."""
    launch(tmp_path, "r=8, use_vera=True")
    assert_as_one_process(tmp_path, tmp_path / "single", r=8, use_vera=True)


def test_summary_comes_from_the_first_process_alone(run: tuple[Path, str]) -> None:
    assert run[1].count("trainable ") == 1


def test_the_checkpoint_goes_on_in_one_process(run: tuple[Path, str], tmp_path: Path) -> None:
    assert_adapter_only(run[0] / "last.ckpt", snapshot(Toy()))
    module = load_from_checkpoint(Toy, run[0] / "last.ckpt")
    merged = Toy()
    merged.load_state_dict(torch.load(run[0] / "merged-0.pt"))
    torch.testing.assert_close(module.eval()(inputs()), merged.eval()(inputs()), rtol=1e-5, atol=1e-5)
    model = Toy()
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False)], max_epochs=3)
    trainer.fit(model, toys.loader(), ckpt_path=run[0] / "last.ckpt")
    assert trainer.global_step == 12
