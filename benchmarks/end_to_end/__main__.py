"""The recipes as users run them, beside TRL and transformers' Trainer with PEFT: tokens a second, memory and losses.

Every run is a process of its own, of one thread, for its peak memory and its processor seconds; the contenders take
turns. Each adds a line to ``runs.jsonl``, so that an interruption loses one run, and the same command goes on.

    python -m benchmarks.end_to_end
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 python -m benchmarks.end_to_end
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import harness
from benchmarks.end_to_end.contenders import CONTENDERS, RECIPES, Run, measure
from benchmarks.end_to_end.start import save_bases
from benchmarks.end_to_end.summary import cells, summary
from lightning_lora import shipped_recipes

ROOT = Path(__file__).parents[2]
RUNS = harness.RESULTS / "end_to_end.jsonl"
PARTS = ("chat", "classify", "dropout", "curve")
COLUMNS = ("tokens a CPU second", "ours over it", "peak, GB", "beyond rest, GB", "ours of it", "difference of losses")


def plan(parts: list[str], turns: int, isa: str, steps: int) -> Iterator[Run]:
    """The runs, in the order in which they are made."""
    for turn in range(turns):
        if "chat" in parts:
            yield from _turn("chat", turn, isa, 256, 4, 1, steps)
        if "classify" in parts:
            yield from _turn("classify", turn, isa, 64, 32, 3, 14)
        if "dropout" in parts:
            yield from _turn("chat", turn, isa, 256, 4, 1, steps, dropout=0.05, only=2)
        if "curve" in parts:
            for length, rows, most in CURVE:
                yield from _turn("chat", turn, isa, length, rows, 1, min(steps, most), only=2)


CURVE = [(128, 8, 2), (512, 2, 2), (1024, 1, 2), (2048, 1, 1), (128, 1, 3), (128, 4, 3)]


def _turn(
    task: str,
    turn: int,
    isa: str,
    length: int,
    rows: int,
    warm_up: int,
    steps: int,
    dropout: float = 0.0,
    only: int | None = None,
) -> list[Run]:
    """A run of each contender; every other turn backwards."""
    names = list(CONTENDERS[task])[:only][:: -1 if turn % 2 else 1]
    return [Run(task, name, length, rows, warm_up, steps, turn, dropout, isa) for name in names]


def read(path: Path) -> list[dict[str, Any]]:
    """All runs of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_apart(run: Run, bases: Path, seconds: float) -> dict[str, Any]:
    """Make a run in a process of its own, in a folder of its own."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **threads, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        given = json.dumps([asdict(run), str(bases / run.task), str(figures)])
        command = [sys.executable, "-m", "benchmarks.end_to_end", "--run", given]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise SystemExit(f"{run} ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(figures.read_text())
        return {**asdict(run), **found, "tokens": int(done.stdout.split()[-1]), "load": os.getloadavg()[0]}


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=3, help="of a run of chat that count, at the most; default 3")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the file with a line for each run")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of a run at most; default 300")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.run:
        settings, base, figures = json.loads(args.run)
        print(measure(Run(**settings), base, figures))
        return
    isa = torch.backends.cpu.get_cpu_capability()
    made = read(args.runs)
    wanted = plan(args.parts, args.turns, isa, args.steps)
    missing = [run for run in wanted if not any(asdict(run).items() <= row.items() for row in made)]
    if missing:
        recipe = yaml.safe_load(shipped_recipes.recipes()[RECIPES["classify"]].read_text())
        with tempfile.TemporaryDirectory() as folder:
            save_bases(Path(folder), recipe["model"]["init_args"]["labels"])
            for run in missing:
                row = run_apart(run, Path(folder), args.timeout)
                with args.runs.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    rows = summary(read(args.runs))
    del args.run, args.runs, args.timeout
    harness.report("end_to_end", args, rows, COLUMNS, cells)


if __name__ == "__main__":
    main()
