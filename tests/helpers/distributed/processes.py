"""Jobs in several real processes with gloo, set up as by torchrun, with a time limit, and none left behind."""

import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers.distributed
from helpers import TESTS
from helpers.distributed import copies
from helpers.distributed.copies import Copy

LET_GO = b"."  # what a rank is told when every rank has a result or has ended


@dataclass(frozen=True)
class Ended:
    """How the process of one rank ended."""

    returncode: int | None  # None: it was still running at the limit
    output: str
    result: dict[str, Any] | None


def run_processes(job: str, *args: Any, world_size: int = 2, limit: float = 120) -> list[dict[str, Any]]:
    """Run a function of ``jobs.py`` in ``world_size`` processes and return what each rank returned.

    Args:
        job: Name of the function, with that of its module before it if it is in another. It takes ``args`` and returns
            a dict; all of it passes through JSON. The environment is that of torchrun, so that a Trainer with
            ``devices=world_size`` starts no processes of its own.
        args: Its arguments.
        world_size: How many processes.
        limit: Seconds after which all of them, and what they have started, are killed.

    Raises:
        AssertionError: If a rank failed or was still running at the limit, with what every rank printed.
    """
    ranks = end_processes(job, *args, world_size=world_size, limit=limit)
    if any(rank.returncode != 0 for rank in ranks):
        raise AssertionError("\n".join(_told(number, rank, limit) for number, rank in enumerate(ranks)))
    return [rank.result or {} for rank in ranks]


def end_processes(job: str, *args: Any, world_size: int = 2, limit: float = 120) -> list[Ended]:
    """As :func:`run_processes`, for a job that may fail: tell of each rank how it ended."""
    port = _free_port()
    processes: list[Copy] = []
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, f"{rank}.txt") for rank in range(world_size)]
        results = [Path(scratch, f"{rank}.json") for rank in range(world_size)]
        try:
            for rank in range(world_size):
                arguments = [job, json.dumps(args), str(results[rank])]
                with outputs[rank].open("wb") as output:
                    processes.append(Copy(rank, arguments, _environment(rank, world_size, port), output))
            returncodes = _wait(processes, results, limit)
        finally:
            for process in processes:
                _kill_group(process.pid)
                process.wait()
                process.stdin.close()
        return [
            Ended(code, output.read_text(), json.loads(result.read_text()) if result.exists() else None)
            for code, output, result in zip(returncodes, outputs, results, strict=True)
        ]


def _wait(processes: list[Copy], results: list[Path], limit: float) -> list[int | None]:
    end = time.monotonic() + limit
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        # The first to end closes its connections, and would break a collective in which another still is.
        if all(process.poll() is not None or result.exists() for process, result in zip(processes, results)):
            for process in processes:
                _let_go(process)
        time.sleep(0.05)
    return [process.poll() for process in processes]


def _let_go(process: Copy) -> None:
    try:
        os.write(process.stdin.fileno(), LET_GO)
    except BrokenPipeError:  # it has ended
        return


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # all of it has ended
        return


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    # Without the seed that a test before may have set, which Lightning's sampler would take.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _told(number: int, rank: Ended, limit: float) -> str:
    how = f"was still running after {limit} s" if rank.returncode is None else f"ended with {rank.returncode}"
    return f"--- rank {number} {how}:\n{rank.output}"


def _end_as_parent_says() -> None:
    if os.read(sys.stdin.fileno(), 1) == LET_GO:
        os._exit(0)  # the threads of gloo may still be at work, and would be torn down with the interpreter
    _kill_group(os.getpgrp())


def _main(job: str, args: str, result: str) -> None:
    parent = threading.Thread(target=_end_as_parent_says, daemon=True)
    parent.start()
    module, _, function = job.rpartition(".")
    returned = getattr(importlib.import_module(f"{__package__}.{module or 'jobs'}"), function)(*json.loads(args))
    sys.stdout.flush()
    whole = Path(f"{result}.{os.getpid()}")  # a process that this one has started writes to the same place
    whole.write_text(json.dumps(returned))
    whole.replace(result)
    parent.join()


def _wait_for_jobs(descriptor: int) -> None:
    for module in pkgutil.iter_modules(helpers.distributed.__path__):
        if f"{__package__}.{module.name}" != __spec__.name:
            importlib.import_module(f"{__package__}.{module.name}")
    copies.wait(descriptor, lambda arguments: _main(*arguments))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _wait_for_jobs(int(sys.argv[1]))
    else:
        _main(*sys.argv[1:])
