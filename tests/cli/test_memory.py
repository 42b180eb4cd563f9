"""``lightning-lora memory``."""

import re
from pathlib import Path

import pytest
from helpers.recipe_runs import run


def test_the_table_adds_up_and_nothing_is_written(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    before = {path.name for path in tmp_path.iterdir()}
    run(tmp_path, monkeypatch, "memory", "chat_sft", *tiny, "--lora.r", "8", "--trainer.strategy", "fsdp")
    out = capsys.readouterr().out
    sizes = {name.strip(): float(size) for name, size in re.findall(r"│ ([a-z ]+?) +│.*│ +([\d.]+) MB │", out)}
    parts = ("frozen base", "adapters", "optimizer moments", "gradients", "activations")
    assert list(sizes) == [*parts, "peak"]
    assert sum(sizes[name] for name in parts) == pytest.approx(sizes["peak"], abs=0.3)
    assert "fsdp shares the model among processes" in out
    assert {path.name for path in tmp_path.iterdir()} == before
