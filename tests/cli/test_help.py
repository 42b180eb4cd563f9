"""Who answers a command line, and how quickly."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.cli import help
from lightning_lora.cli.main import main

ROOT = Path(lightning_lora.__file__).parents[1]
HEAVY = "{'torch', 'lightning', 'transformers', 'jsonargparse'}"
HELP = [[], ["--help"], ["-h"], ["help"], ["--version"], ["recipes"], ["recipes", "--help"]]
HELP += [[command, "--help"] for command in help.RUNS | help.ADAPTER_FILES]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from lightning_lora.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {HEAVY} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"]], ids=" ".join)
def test_help_is_quick(arguments: list[str]) -> None:
    def seconds(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True, cwd=ROOT)
        return time.perf_counter() - start

    # Beside an interpreter that does nothing, for a machine may be slow or busy.
    took = min(seconds("-m", "lightning_lora", *arguments) - seconds("-c", "pass") for _ in range(3))
    assert took < 0.3


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-lora {lightning_lora.__version__}\n"


def test_help_of_a_run_names_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command, purpose in help.RUNS.items():
        main([command, "-h"])
        out = capsys.readouterr().out
        assert out.startswith(f"usage: lightning-lora {command} --config") and f"\n{purpose}\n" in out


@pytest.mark.parametrize("command", help.ADAPTER_FILES)
def test_wrong_calls_end_with_two(command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command])
    assert stop.value.code == 2
