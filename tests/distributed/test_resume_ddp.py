"""A run in two processes that was stopped and resumed ends as the one that was not."""

import signal
from pathlib import Path

import pytest
import torch
from helpers.distributed import jobs
from helpers.distributed.processes import end_processes, run_processes


def test_each_rank_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    """In the middle of an epoch; with other seeds, so that everything that the ranks draw is in the file."""
    ranks = run_processes(
        "train_each",
        {"directory": str(tmp_path / "whole")},
        {"directory": str(tmp_path / "resumed"), "ckpt_path": str(tmp_path / "whole" / "step=6.ckpt"), "seed": 99},
    )
    for rank in ranks:
        whole, resumed = rank["runs"]
        assert resumed == whole
    first, second = (rank["runs"][0] for rank in ranks)
    assert first["next numbers"] != second["next numbers"]
    assert first["adapter"] == second["adapter"]
    states = torch.load(tmp_path / "whole" / "step=6.ckpt", weights_only=True)["lightning_lora"]["rng"]["states"]
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


def test_more_or_fewer_processes_go_on_at_the_same_row(tmp_path: Path) -> None:
    """An epoch has 8 batches in one process, and 4 in each of two."""
    jobs.train(str(tmp_path / "one"))
    two = run_processes("train", str(tmp_path / "two"), str(tmp_path / "one" / "step=12.ckpt"))[0]
    assert two["step"] == 12 + 2 + 2 * 4
    one = jobs.train(str(tmp_path / "one again"), str(tmp_path / "two" / "step=15.ckpt"))
    assert one["step"] == 15 + 6 + 8


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_the_run_resumes(tmp_path: Path) -> None:
    first, second = end_processes("train", str(tmp_path / "stopped"), None, 1, [1, 8, "kill"], limit=60)
    assert second.returncode == -signal.SIGKILL, second.output
    assert first.returncode not in (None, 0), first.output  # it does not wait for the other
    for rank in run_processes(
        "train_each",
        {"directory": str(tmp_path / "whole")},
        {"directory": str(tmp_path / "stopped"), "ckpt_path": "last", "seed": 99},
    ):
        whole, resumed = rank["runs"]
        assert resumed == whole
        assert whole["step"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("doomed", [0, 1])
def test_a_rank_that_raises_ends_the_other_too(tmp_path: Path, doomed: int) -> None:
    ranks = end_processes("train", str(tmp_path), None, 1, [doomed, 8, "raise"], limit=60)
    assert [rank.returncode for rank in ranks] == [1, 1], "\n".join(rank.output for rank in ranks)
    assert "on purpose" in ranks[doomed].output
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
