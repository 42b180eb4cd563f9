import statistics
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT

import lightning_lora


def test_public_names_are_there() -> None:
    assert all(hasattr(lightning_lora, name) for name in lightning_lora.__all__)


def test_importing_brings_in_nothing_heavy() -> None:
    code = (
        "import sys, lightning; before = set(sys.modules); from lightning_lora import *; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in "
        "('transformers', 'torchmetrics', 'rich', 'peft', 'jsonargparse')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_takes_a_tenth_of_what_lightning_takes_at_most() -> None:
    code = """
import time
start = time.perf_counter()
import lightning
between = time.perf_counter()
from lightning_lora import *
print((time.perf_counter() - between) / (between - start))
"""
    ratios = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert statistics.median(ratios) <= 0.1


def test_the_wheel_holds_every_package_and_every_recipe() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(yaml.safe_load("[" + text.split("packages = [")[1].split("]")[0] + "]"))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lightning_lora").rglob("__init__.py")}
    assert listed == found | {"lightning_lora.recipes"}
    assert '"lightning_lora.recipes" = ["*.yaml", "data/*.jsonl", "data/README.md"]' in text
