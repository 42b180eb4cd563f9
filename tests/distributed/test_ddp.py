"""Two real processes with gloo, beside one process on the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.distributed.processes import end_processes
from helpers.toys import Toy, assert_adapter_only, inputs, snapshot
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_lora import LoRA, load_from_checkpoint


def launch(path: Path, **settings: Any) -> str:
    """Train with ``LoRA(**settings)`` in two processes, of which Lightning starts the second; return their output."""
    (ended,) = end_processes("launched", str(path), settings, world_size=1)
    assert ended.returncode == 0, ended.output
    return ended.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("ddp")
    return path, launch(path, r=2)


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


@pytest.mark.slow
def test_vera_in_two_processes(tmp_path: Path) -> None:
    """Each process draws the shared pair by itself."""
    launch(tmp_path, r=8, use_vera=True)
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
