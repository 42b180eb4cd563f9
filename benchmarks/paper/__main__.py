"""The claims of the LoRA paper: full fine-tuning, LoRA of several ranks, prefix tuning, and the head alone.

Two tasks: an encoder on text classification, and a causal language model, with the weights and data of the recipes.
Three steps, each of which adds to the files beside this one and goes on where it stopped:

    python -m benchmarks.paper search   # learning rates, one for each kind, scored on training rows kept aside
    python -m benchmarks.paper train    # three seeds each; every run is a process of its own, for its peak memory
    python -m benchmarks.paper time     # steps and latencies, in turn in one process, as ratios; on an idle machine
    python -m benchmarks.paper table    # what README shows
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.paper.contenders import GGUF, RANKS, SMOLLM, TASKS, contenders, kind_of
from benchmarks.paper.results import append, chosen_rate, read

HERE = Path(__file__).parent
SEARCH_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "train", "time", "table", "one"])
    parser.add_argument("--task", choices=["encoder", "causal"], help="default: both")
    parser.add_argument("--only", nargs="+", help="names of contenders, such as full qv-8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the figures are; default: beside the source")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    runs, timings = given.folder / "runs.jsonl", given.folder / "timings.jsonl"
    if given.what == "one":
        from benchmarks.paper.train import train

        print(json.dumps(train(**given.run)))
        return
    tasks = [given.task] if given.task else ["encoder", "causal"]
    if given.what == "table":
        from benchmarks.paper.table import markdown

        print("\n\n".join(markdown(task, read(runs), read(timings)) for task in tasks))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = _convert(folder) if "causal" in tasks else None
        if given.what == "search":
            for task, name, lr in _search(tasks, given.only):
                _run(runs, given.steps, weights, task=task, contender=name, seed=SEARCH_SEED, lr=lr, search=True)
        elif given.what == "train":
            for seed, (task, name) in product(given.seeds, _contenders(tasks, given.only)):
                lr = chosen_rate(task, name, read(runs))
                _run(runs, given.steps, weights, task=task, contender=name, seed=seed, lr=lr, search=False)
        else:
            from benchmarks.paper.timings import measure

            for task, name in _contenders(tasks, given.only):
                append(timings, measure(task, name, weights))


def _contenders(tasks: list[str], only: list[str] | None) -> list[tuple[str, str]]:
    return [(task, name) for task in tasks for name in contenders(task) if not only or name in only]


def _search(tasks: list[str], only: list[str] | None) -> list[tuple[str, str, float]]:
    """A contender of each kind, with each of its rates."""
    return [
        (task, name, lr)
        for task, name in _contenders(tasks, only)
        for lr in TASKS[task].rates[kind_of(name)]
        if name in (kind_of(name), f"{kind_of(name)}-{RANKS[0]}")
    ]


def _run(path: Path, steps: int | None, weights: str | None, **run: Any) -> None:
    """One run in a process of its own, unless the file has it already."""
    run["steps"] = steps or TASKS[run["task"]].steps
    if any(run.items() <= row.items() for row in read(path)):
        return
    settings = json.dumps({**run, "weights": weights})
    command = [sys.executable, "-m", "benchmarks.paper", "one", "--run", settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{settings}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    append(path, run | json.loads(done.stdout.splitlines()[-1]))
    print(path.read_text().splitlines()[-1], flush=True)


def _convert(folder: str) -> str:
    """The causal model as an ordinary checkpoint, once for all runs."""
    import torch

    from lightning_lora.tasks.pretrained import load_causal_lm, load_tokenizer

    load_causal_lm(SMOLLM, GGUF, torch.float32).save_pretrained(folder)
    load_tokenizer(SMOLLM, GGUF).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
