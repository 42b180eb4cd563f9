"""Everything that is to be known on a GPU, within minutes: tests, then figures, in order of worth.

    python -m benchmarks.gpu --minutes 8 --out found
    python -m benchmarks.gpu --smoke --out found

It needs torch with CUDA, lightning, transformers, PEFT, safetensors, torchmetrics, rich and pytest, runs from the
repository's root, and fetches nothing. Each part is a process of its own with a time limit, so that no error and no
hanging ends the others. ``gpu.json`` and ``gpu.md`` in the folder hold what has been found by then, also if this
process is ended. ``--smoke`` runs the same on tiny models on a CPU. The exit status is 0 if every part was done without
an error.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu.plan import PARTS
from benchmarks.gpu.report import Ended, read_tasks, write

ROOT = Path(__file__).parents[2]
_KEPT = 4000  # characters of what a part printed


def run_part(name: str, limit: float, smoke: bool, parts: dict[str, Ended], out: Path) -> None:
    """Run one part, and write after each of its tasks what has been found."""
    begun = time.monotonic()
    own = parts[name] = Ended("running")
    with tempfile.TemporaryDirectory() as scratch:
        said, folder = Path(scratch, "said.txt"), Path(scratch, "tasks")
        folder.mkdir()
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.part", name, str(folder), *(["--smoke"] if smoke else [])],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group, to be ended as one
            )
        try:
            code: int | None = None
            while code is None and time.monotonic() - begun < limit:
                try:
                    code = process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    _note(own, begun, folder, parts, out)
        finally:
            _end_group(process)
        own.state = "out of time" if code is None else "done" if code == 0 else f"ended with {code}"
        own.said = "" if code == 0 else said.read_text(errors="replace")[-_KEPT:]
        _note(own, begun, folder, parts, out)


def _note(own: Ended, begun: float, folder: Path, parts: dict[str, Ended], out: Path) -> None:
    own.seconds = time.monotonic() - begun
    own.tasks = read_tasks(folder)
    write(out, parts)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End what the process has left running, too."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it ends; default 8")
    parser.add_argument("--out", type=Path, required=True, help="the folder for gpu.json and gpu.md")
    parser.add_argument("--parts", default="".join(PARTS), help=f"default {''.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"found part {unknown[0]!r}, expected some of {''.join(PARTS)}")
    if args.minutes <= 0:
        parser.error(f"found --minutes {args.minutes:g}, expected more than 0")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("found no CUDA device that torch can use, expected one; --smoke runs the same on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    whole = 60 * args.minutes
    end = time.monotonic() + whole
    parts = {name: Ended("not begun") for name in args.parts}
    for name in parts:
        left = end - time.monotonic()
        if left <= 0:
            break
        run_part(name, min(left, PARTS[name].share * whole), args.smoke, parts, args.out)
        print(f"{name}. {PARTS[name].title}: {parts[name].state}, {parts[name].seconds:.0f} s", flush=True)
    write(args.out, parts)
    return 0 if all(part.is_well() for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
