"""The tests for GPUs, each written down as soon as it has ended.

python -m benchmarks.gpu.checks --device cuda
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness

TESTS = Path(__file__).parents[2] / "tests" / "gpu"


class Recorder:
    """A plugin of pytest that keeps the outcome of each test, its seconds, and the end of what it said."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._note(report.nodeid, "failed", 0.0, str(report.longrepr))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            self._note(report.nodeid, report.outcome, report.duration, said)

    def _note(self, name: str, outcome: str, seconds: float, said: str) -> None:
        self.rows[name.rpartition("/")[2]] = {"outcome": outcome, "seconds": seconds, "said": said[-2000:]}
        # Anew after each, since a GPU may end the whole process.
        table = [["", "outcome", "seconds"]]
        table += [[name, row["outcome"], f"{row['seconds']:.1f}"] for name, row in self.rows.items()]
        found = {
            "settings": {"device": self.args.device},
            "machine": harness.machine(self.args.device),
            "rows": self.rows,
            "table": table,
        }
        self.args.json.write_text(json.dumps(found, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.set_defaults(json=harness.RESULTS / "checks.json")
    args = parser.parse_args(arguments)
    options = ["-m", "gpu", "-k", args.device, "-p", "no:cacheprovider", "--rootdir", str(TESTS.parents[1])]
    code = pytest.main([str(TESTS), *options], plugins=[Recorder(args)])
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"pytest ended with {pytest.ExitCode(code).name}")


if __name__ == "__main__":
    main()
