"""The kit for GPUs: it runs on a CPU, what it runs on a GPU is well-formed, and nothing that goes wrong ends it."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import part, report
from benchmarks.gpu.plan import PARTS, Task

TASKS = {task.name: task for each in PARTS.values() for task in each.tasks}


@pytest.mark.slow
def test_a_smoke_run_does_all_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--minutes", "20", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    page = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, page
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == list(PARTS)
    for name, found in parts.items():
        assert found["state"] == "done"
        assert list(found["tasks"]) == [task.name for task in PARTS[name].tasks]
        assert all(task.get("rows") or task.get("skipped") for task in found["tasks"].values())
    outcomes = [row["outcome"] for row in parts["a"]["tasks"]["tests"]["rows"].values()]
    assert outcomes.count("passed") > 15
    assert "| ours, all |" in page


class _ParsedError(Exception):
    """Arguments that a parser took."""


@pytest.mark.parametrize("smoke", [False, True], ids=["on a GPU", "smoke"])
@pytest.mark.parametrize("name", TASKS)
def test_the_arguments_are_those_that_each_module_takes(
    name: str, smoke: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parse = argparse.ArgumentParser.parse_args
    taken: list[Any] = []

    def parse_and_stop(self: argparse.ArgumentParser, arguments: list[str]) -> Any:
        taken.append(parse(self, arguments))
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    task = TASKS[name]
    with pytest.raises(_ParsedError):
        importlib.import_module(task.module).main(
            [*(task.smoke if smoke else task.arguments).split(), "--json", str(tmp_path / "found.json")]
        )
    device = taken[0].device
    assert device == ("cpu" if smoke else "cuda")


def test_an_error_of_a_task_is_its_result(tmp_path: Path) -> None:
    part.run_task(Task("broken", "json", "", ""), tmp_path, smoke=True)
    part.run_task(Task("left", "json", "", "", needs="a_package_that_is_not_there"), tmp_path, smoke=True)
    part.run_task(Task("refused", "benchmarks.step", "--shape 9000B", ""), tmp_path, smoke=False)
    tasks = report.read_tasks(tmp_path)
    assert "has no attribute 'main'" in tasks["broken"]["error"]
    assert tasks["left"]["skipped"] == "a_package_that_is_not_there is not installed"
    assert "SystemExit" in tasks["refused"]["error"]
    page = report.markdown({"b": report.Ended("done", tasks=tasks)})
    assert "has no attribute 'main'" in page
    assert "Left out: a_package_that_is_not_there is not installed." in page
    assert not report.Ended("done", tasks=tasks).is_well()


def test_it_ends_in_time_and_says_what_was_not_done(tmp_path: Path) -> None:
    assert kit.main(["--smoke", "--minutes", "0.01", "--parts", "ab", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["a"]["state"] == "out of time"
    assert parts["b"]["state"] in ("out of time", "not begun")
    assert "out of time" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--parts", "az"], "found part 'z'"), (["--minutes", "0"], "expected more than 0")],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kit.main([*arguments, "--out", str(tmp_path / "found")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kit.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kit.main(["--out", str(tmp_path / "found")])
    assert "found no CUDA device" in capsys.readouterr().err
