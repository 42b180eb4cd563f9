"""Seconds that importing all public names takes after ``import lightning``: of this package and of PEFT.

Each is timed in a fresh interpreter.

    python -m benchmarks.imports
"""

import subprocess
import sys

from benchmarks import harness

TIMED = "import time{before}; start = time.perf_counter(); from {package} import *; print(time.perf_counter() - start)"


def import_seconds(package: str, before: str) -> float:
    """In an interpreter of its own."""
    code = TIMED.format(package=package, before=before)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(arguments: list[str] | None = None) -> None:
    args = harness.parser(__doc__, turns=3).parse_args(arguments)
    imports = {"lightning": "", "lightning_lora": ", lightning", "peft": ", lightning"}
    times: dict[str, list[float]] = {package: [] for package in imports}
    for turn in range(args.turns + 1):
        for package, before in imports.items():
            taken = import_seconds(package, before)
            if turn:  # the first fills the disk's cache
                times[package].append(taken)
    harness.report(
        "imports",
        args,
        harness.ratios(times, to="lightning"),
        ("seconds", "over lightning's own (quartiles)"),
        lambda row: (f"{row['seconds']:.3f}", harness.spread(row, 3)),
    )


if __name__ == "__main__":
    main()
