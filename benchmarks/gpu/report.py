"""One file of figures and one page of tables, of whatever has been found so far."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import publish
from benchmarks.gpu.plan import PARTS

PACKAGES = ("torch", "triton", "lightning", "transformers", "peft", "bitsandbytes", "safetensors", "torchmetrics")


@dataclass
class Ended:
    """How a part ended.

    Attributes:
        state: ``running``, ``done``, ``out of time``, ``not begun``, or ``ended with <code>``.
        seconds: That it took.
        said: The end of what it printed, if it did not end well.
        tasks: What each of its tasks has found, by name.
    """

    state: str
    seconds: float = 0.0
    said: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)

    def is_well(self) -> bool:
        """Whether all of it has been done, without an error."""
        return self.state == "done" and not any("error" in task for task in self.tasks.values())


def write(folder: Path, parts: dict[str, Ended]) -> None:
    """Write ``gpu.json`` and ``gpu.md``, each as a whole."""
    found = {"versions": versions(), "parts": {name: asdict(part) for name, part in parts.items()}}
    publish(folder / "gpu.json", found)
    (folder / "gpu.md").write_text(markdown(parts))


def read_tasks(folder: Path) -> dict[str, Any]:
    """What the tasks of a part have left, in the order in which they ended."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    found = {}
    for file in files:
        try:
            found[file.stem] = json.loads(file.read_text())
        except json.JSONDecodeError:  # being written; there is a next time
            continue
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def markdown(parts: dict[str, Ended]) -> str:
    """The page."""
    tasks = [task for part in parts.values() for task in part.tasks.values()]
    devices = {task["machine"]["device"] for task in tasks if "machine" in task}
    lines = [
        f"# On {', '.join(sorted(devices)) or 'no device yet'}",
        "",
        ", ".join(f"{package} {number}" for package, number in versions().items()),
    ]
    for name, part in parts.items():
        lines += ["", f"## {name}. {PARTS[name].title}", "", f"{part.state}, {part.seconds:.0f} s"]
        if part.said:
            lines += ["", "```", part.said, "```"]
        for task, found in part.tasks.items():
            lines += ["", f"### {task}", ""]
            lines += [", ".join(f"{key}: {value}" for key, value in found.get("settings", {}).items()), ""]
            lines += table(found.get("table", []))
            lines += [f"Left out: {found['skipped']}."] if "skipped" in found else []
            lines += ["```", found["error"].strip(), "```"] if "error" in found else []
            said = {test: row["said"] for test, row in found.get("rows", {}).items() if row.get("outcome") == "failed"}
            for test, end in said.items():
                lines += ["", test, "", "```", end, "```"]
    return "\n".join(lines) + "\n"


def table(rows: list[list[str]]) -> list[str]:
    """Rows of Markdown, the first being the headings."""
    if not rows:
        return []
    cut = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cut]
