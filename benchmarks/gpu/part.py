"""The tasks of one part in a process of its own, each kept from the errors of the others."""

import argparse
import gc
import importlib
import importlib.util
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.plan import PARTS, Task


def run_task(task: Task, folder: Path, smoke: bool) -> None:
    """Run one, and leave what it found, or the error that it ended with, in ``<folder>/<name>.json``."""
    path = folder / f"{task.name}.json"
    start = time.monotonic()
    found: dict[str, Any] = {}
    if task.needs is not None and importlib.util.find_spec(task.needs) is None:
        found["skipped"] = f"{task.needs} is not installed"
    else:
        arguments = (task.smoke if smoke else task.arguments).split()
        try:
            importlib.import_module(task.module).main([*arguments, "--json", str(path)])
        except (Exception, SystemExit):  # whatever ends a task is its result, and the next one runs
            found["error"] = traceback.format_exc()
        if path.exists():  # also what it wrote before an error
            found = {**json.loads(path.read_text()), **found}
    publish(path, {**found, "took": time.monotonic() - start})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def publish(path: Path, found: dict[str, Any]) -> None:
    """Write a file that others may read meanwhile."""
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(found, indent=1) + "\n")
    whole.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    for task in PARTS[args.part].tasks:
        run_task(task, args.folder, args.smoke)


if __name__ == "__main__":
    main()
