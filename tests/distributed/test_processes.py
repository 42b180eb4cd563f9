"""The helper that the other tests here start their processes with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TESTS
from helpers.distributed.processes import end_processes, run_processes


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_all_ended(directory: Path) -> None:
    pids = [int(pid) for path in directory.glob("*.pids") for pid in path.read_text().split()]
    assert len(pids) == 4
    end = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if running(pid)]


def test_each_rank_returns_what_it_found() -> None:
    assert run_processes("add_ranks", 10) == [{"rank": 0, "total": 21}, {"rank": 1, "total": 21}]


def test_a_rank_that_is_done_stays_until_the_others_are(tmp_path: Path) -> None:
    """Its end would close connections that another rank's last collective still reads from."""
    assert all(rank["there"] for rank in run_processes("outlast", str(tmp_path)))


def test_a_failure_shows_what_the_ranks_printed() -> None:
    with pytest.raises(AssertionError, match="rank 0 ended with 0(.|\n)*rank 1 ended with 1(.|\n)*second rank fails"):
        run_processes("fail_on_one")


@pytest.mark.slow
def test_nothing_runs_on_after_the_limit(tmp_path: Path) -> None:
    ranks = end_processes("hang_with_a_child", str(tmp_path), limit=40)
    assert [rank.returncode for rank in ranks] == [None, None]
    assert_all_ended(tmp_path)


@pytest.mark.slow
def test_nothing_runs_on_when_the_caller_is_killed(tmp_path: Path) -> None:
    script = (
        f"from helpers.distributed import processes; processes.run_processes('hang_with_a_child', {str(tmp_path)!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(TESTS)})
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pids"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    time.sleep(0.2)
    assert_all_ended(tmp_path)
