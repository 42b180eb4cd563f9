"""The directory of a sharded checkpoint that is interrupted half-way never takes the place of the last good one."""

import signal
from pathlib import Path

import pytest
import torch
from helpers.distributed.processes import end_processes, run_processes

from lightning_lora.formats.dcp import read_directory


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2 distributed", "fsdp sharded"])
def test_a_process_killed_while_it_writes_a_directory(tmp_path: Path, strategy: str) -> None:
    first, second = end_processes("killed_while_saving_shards", str(tmp_path), strategy)
    assert first.returncode == -signal.SIGKILL, first.output
    assert second.returncode is not None, second.output
    assert next(tmp_path.glob(".last.ckpt.*.partial/meta.pt")).read_bytes() == b"half"
    step = read_directory(tmp_path / "last.ckpt")["global_step"]  # of the first
    resumed = run_processes("sharded.fit", str(tmp_path), strategy, str(tmp_path / "last.ckpt"))
    for rank in resumed:
        assert rank["step"] == 2 * step
        assert len(rank["losses"]) == step  # that remained to be taken
    assert torch.load(tmp_path / "last.ckpt" / "meta.pt", weights_only=True)["global_step"] == 2 * step
    assert not list(tmp_path.glob(".*"))
