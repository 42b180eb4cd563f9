"""What the tests here run in several processes, see ``processes.py``: each function takes and returns plain JSON."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist


def rank() -> int:
    return int(os.environ["RANK"])


def add_ranks(offset: int) -> dict[str, Any]:
    """Both processes meet over gloo."""
    dist.init_process_group("gloo")
    total: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(total, rank() + offset)
    dist.destroy_process_group()
    return {"rank": rank(), "total": sum(total)}


def fail_on_one() -> dict[str, Any]:
    if rank() == 1:
        raise ValueError("the second rank fails")
    return {}


def hang_with_a_child(directory: str) -> dict[str, Any]:
    """Leave the pids of this process and of one that it starts, and sleep for longer than any test."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(directory, f"{rank()}.pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


def killed_while_saving(directory: str) -> dict[str, Any]:
    import test_atomic

    class Kill(test_atomic.HalfMove):
        def end(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    shutil.move = Kill(times=2)
    test_atomic.fit(Path(directory))
    return {}
