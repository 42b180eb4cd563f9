"""The claims of the LoRA paper: full fine-tuning, LoRA of several ranks, prefix tuning, and the head alone.

Two tasks: an encoder on text classification, and a causal language model, with the weights and data of the recipes.
Three steps, each of which adds to the files beside this one and goes on where it stopped:

    python -m benchmarks.paper search   # learning rates, one for each kind, scored on training rows kept aside
    python -m benchmarks.paper train    # three seeds each; every run is a process of its own, for its peak memory
    python -m benchmarks.paper time     # steps and latencies, in turn in one process, as ratios; on an idle machine
    python -m benchmarks.paper table    # what README shows
"""

import argparse
import tempfile
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.paper.contenders import GGUF, RANKS, SMOLLM, TASKS, contenders, kind_of
from benchmarks.paper.results import append, chosen_rate, read
from benchmarks.paper.table import markdown
from benchmarks.paper.timings import measure
from benchmarks.paper.train import train
from lightning_lora.pretrained import load_causal_lm, load_tokenizer

HERE = Path(__file__).parent
SEARCH_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "train", "time", "table"])
    parser.add_argument("--task", choices=["encoder", "causal"], help="default: both")
    parser.add_argument("--only", nargs="+", help="names of contenders, such as full qv-8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the figures are; default: beside the source")
    given = parser.parse_args()
    runs, timings = given.folder / "runs.jsonl", given.folder / "timings.jsonl"
    tasks = [given.task] if given.task else ["encoder", "causal"]
    if given.what == "table":
        print("\n\n".join(markdown(task, read(runs), read(timings)) for task in tasks))
        return
    # A process of its own for each run, forked after the imports, so that its peak memory is its own.
    with tempfile.TemporaryDirectory() as folder, get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        weights = pool.apply(_convert, [folder]) if "causal" in tasks else None
        if given.what == "time":
            for task, name in _contenders(tasks, given.only):
                append(timings, pool.apply(measure, [task, name, weights]))
            return
        search = given.what == "search"
        if search:
            plan = [(SEARCH_SEED, *found) for found in _search(tasks, given.only)]
        else:
            chosen = _contenders(tasks, given.only)
            plan = [(seed, *found, chosen_rate(*found, read(runs))) for seed, found in product(given.seeds, chosen)]
        for seed, task, name, lr in plan:
            steps = given.steps or TASKS[task].steps
            run = {"task": task, "contender": name, "seed": seed, "lr": lr, "search": search, "steps": steps}
            if not any(run.items() <= row.items() for row in read(runs)):
                append(runs, run | pool.apply(train, kwds=run | {"weights": weights}))
                print(run, flush=True)


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


def _convert(folder: str) -> str:
    """The causal model as an ordinary checkpoint, once for all runs."""
    load_causal_lm(SMOLLM, GGUF, torch.float32).save_pretrained(folder)
    load_tokenizer(SMOLLM, GGUF).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
