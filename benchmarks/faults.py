"""Runs that are killed at random moments: what they leave opens, and a resumed run ends as the one that was not killed.

Each run trains in one process or two, saves at every step, and exports the adapter and the merged model at its end. It
is killed at a moment drawn from its whole length, all of its processes or one of them. Then every file that has its
name is opened, and the run is resumed. After that, one run makes many steps, and its memory is looked at.

    python -m benchmarks.faults
    python -m benchmarks.faults --kills 40 --steps 300
"""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers.models.auto  # noqa: F401 -- once, before the runs, which are copies of this process
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.harness import SHAPES, base, free_port, join, parser, report
from benchmarks.saving import CpuFSDP
from lightning_lora import LoRA, adapter_state_dict, load_adapter, lora_auto_wrap_policy
from lightning_lora.data import ResumableDataLoader
from lightning_lora.formats.checkpoint import read_checkpoint

STRATEGIES: dict[str, tuple[int, Callable[[], Strategy | str]]] = {
    "one process": (1, lambda: "auto"),
    "ddp": (2, lambda: DDPStrategy(process_group_backend="gloo")),
    "fsdp": (2, lambda: CpuFSDP(auto_wrap_policy=lora_auto_wrap_policy(LlamaDecoderLayer))),
    "fsdp, sharded": (
        2,
        lambda: CpuFSDP(auto_wrap_policy=lora_auto_wrap_policy(LlamaDecoderLayer), state_dict_type="sharded"),
    ),
}
STEPS = 16


class Run(L.LightningModule):
    """A small Llama that learns random rows."""

    def __init__(self) -> None:
        super().__init__()
        self.model = base(SHAPES["tiny"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def train_dataloader(self) -> Any:
        rows = torch.randint(0, 1024, (16, 16), generator=torch.Generator().manual_seed(1))
        return ResumableDataLoader(rows, batch_size=4 // self.trainer.world_size, shuffle=True)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-2)


class Keep(L.Callback):
    """Writes the adapter at the end of training, before it is merged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = adapter_state_dict(pl_module)
        if trainer.is_global_zero:
            torch.save(state, self.path)


def fit(folder: Path, strategy: str, ckpt_path: Path | None) -> None:
    """Train to the end in this process, one of those of the strategy."""
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True)
    L.Trainer(
        accelerator="cpu", devices=STRATEGIES[strategy][0], strategy=STRATEGIES[strategy][1](), max_steps=STEPS,
        callbacks=[Keep(folder / "end.pt"), LoRA(r=4, merge="last", export_dir=folder / "export", summary=False), keep],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Run(), ckpt_path=ckpt_path)  # fmt: skip


def start(folder: Path, strategy: str, ckpt_path: Path | None = None) -> list[int]:
    """Start the processes of a run, copies of this one, and return their numbers."""
    port, world_size, children = free_port(), STRATEGIES[strategy][0], []
    done = multiprocessing.get_context("fork").Barrier(world_size)
    for rank in range(world_size):
        if (child := os.fork()) == 0:
            output = os.open(folder.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            if world_size > 1:
                join(rank, world_size, port)
            code = 1
            try:
                fit(folder, strategy, ckpt_path)
                done.wait(timeout=60)  # the first to end would break a collective in which the other still is
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def over(children: list[int], at: float) -> bool:
    """Wait until a moment, unless all processes end before it."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while time.monotonic() < at:
        if all(os.waitid(os.P_PID, child, options) for child in children):
            return True
        time.sleep(0.005)
    return False


def killed(folder: Path, strategy: str, after: float, which: int | None) -> str:
    """Kill a run, all of its processes or one, and say in which phase that was."""
    children = start(folder, strategy)
    if over(children, time.monotonic() + after):
        wait(children)
        return "over"
    for child in children if which is None else [children[which]]:
        os.kill(child, signal.SIGKILL)
    time.sleep(0.2)  # what another process does of itself then
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait(children)
    if any(folder.rglob(".*.partial")):
        return "while it wrote"
    if (folder / "end.pt").exists():
        return "at its end"
    return "in training" if any(folder.glob("*.ckpt")) else "before a checkpoint"


def problem_of(folder: Path, strategy: str, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with what a killed run has left: with a file of it, or with how it goes on."""
    try:
        for path in folder.glob("*.ckpt"):
            read_checkpoint(path)
        for path in folder.glob("export/adapter"):
            load_adapter(base(SHAPES["tiny"]), path)
        for path in folder.glob("export/merged"):
            LlamaForCausalLM.from_pretrained(path)
    except Exception as error:  # whatever it is, it is a file that does not open, and is counted
        return f"{path.relative_to(folder)}: {error}"
    last = folder / "last.ckpt"
    if any(wait(start(folder, strategy, last if last.exists() else None))):
        return "the resumed run failed"
    found = torch.load(folder / "end.pt")
    exact = strategy == "one process"  # several add gradients in the order in which they come
    same = torch.equal if exact else (lambda one, other: torch.allclose(one, other, rtol=1e-4, atol=1e-6))
    if found.keys() != expected.keys() or not all(same(found[name], expected[name]) for name in expected):
        return "the resumed run ended with other values"
    return "parts are left" if any(folder.rglob(".*.partial")) else None


def kills(strategy: str, number: int, draws: random.Random) -> dict[str, Any]:
    """Kill a number of runs of a strategy."""
    phases: dict[str, int] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        whole.mkdir()
        begun = time.monotonic()
        if any(wait(start(whole, strategy))):
            raise RuntimeError(whole.with_suffix(".0.txt").read_text())
        length, expected = time.monotonic() - begun, torch.load(whole / "end.pt")
        while sum(phases.values()) < number:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            which = draws.choice([None, *range(STRATEGIES[strategy][0])])
            begun = time.monotonic()
            phase = killed(folder, strategy, draws.uniform(0.1, 1.0) * length, which)
            if phase == "over":  # it was faster than those before it
                length = time.monotonic() - begun
                continue
            phases[phase] = phases.get(phase, 0) + 1
            if problem := problem_of(folder, strategy, expected):
                problems.append(f"{phase}: {problem}")
                print(strategy, problems[-1], folder.with_suffix(".0.txt").read_text()[-2000:], file=sys.stderr)
    return {"killed": number, **phases, "lost": len(problems), "problems": problems}


def soak(steps: int) -> dict[str, Any]:
    """Megabytes of this process's own memory after a tenth of the steps, and after all."""
    sizes: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=1, save_last=True)
        L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[LoRA(r=4, summary=False), keep, Look()],
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(Run())  # fmt: skip
    return {"steps": steps, "from": sizes[steps // 10], "to": sizes[-1]}


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=100, help="of each strategy; default 100")
    made.add_argument("--steps", type=int, default=3000, help="of the long run; default 3000")
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args(arguments)
    draws = random.Random(args.seed)  # noqa: S311
    rows: dict[str, dict[str, Any]] = {name: kills(name, args.kills, draws) for name in STRATEGIES}
    rows["a long run"] = soak(args.steps)
    phases = ["before a checkpoint", "in training", "while it wrote", "at its end"]
    report(
        "faults",
        args,
        rows,
        ["killed", *phases, "lost", "memory"],
        lambda row: (
            ["", *[""] * len(phases), "", f"{row['from']:.0f} to {row['to']:.0f} MB in {row['steps']:,} steps"]
            if "from" in row
            else [str(row["killed"]), *(str(row.get(phase, 0)) for phase in phases), str(row["lost"]), ""]
        ),
    )


if __name__ == "__main__":
    main()
