"""EVA in two real processes: both start at what the first one found, and train as one would."""

from pathlib import Path

import pytest
import torch
from helpers import toys
from helpers.distributed.processes import run_processes


@pytest.mark.slow
def test_all_processes_start_at_what_the_first_one_found(tmp_path: Path) -> None:
    run_processes("eva", str(tmp_path))
    for when in ("start", "end"):
        toys.assert_same_tensors(*(torch.load(tmp_path / f"{when}-{rank}.pt") for rank in range(2)))
    start = torch.load(tmp_path / "start-0.pt")["net.0.lora.default.lora_A"]
    torch.testing.assert_close(start @ start.T, torch.eye(2), rtol=0, atol=1e-5)
