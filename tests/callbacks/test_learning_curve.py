"""The learning curve that lies beside the checkpoints."""

import csv
import sys
from pathlib import Path

import pytest
from helpers.recipe_runs import run

from lightning_lora.callbacks import learning_curve


def test_learning_curve_lies_beside_the_checkpoints(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[learning_curve.Curves] = []
    draw = learning_curve.draw
    monkeypatch.setattr(learning_curve, "draw", lambda curves: drawn.append(curves) or draw(curves))
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny)
    folder = tmp_path / "runs/chat_sft/checkpoints"
    rows = list(csv.DictReader((folder / "learning_curve.csv").read_text().splitlines()))
    assert {"train_loss", "val_loss"} <= {row["metric"] for row in rows}
    assert [row["step"] for row in rows if row["metric"] == "train_loss"] == ["0", "1"]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    pictures = [path.read_bytes() for path in (tmp_path / "runs/chat_sft").rglob("learning_curve.png")]
    assert len(pictures) == 3 and len(set(pictures)) == len(drawn) == 1  # of the run, the adapter and the merged model


def test_learning_curve_without_matplotlib_is_a_table(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO"):
        run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny)
    folder = tmp_path / "runs/chat_sft/checkpoints"
    assert (folder / "learning_curve.csv").exists() and not (folder / "learning_curve.png").exists()
    assert "run pip install matplotlib" in caplog.text


def test_a_resumed_run_keeps_what_was_before(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> list[str]:
        text = (tmp_path / "runs/chat_sft/checkpoints/learning_curve.csv").read_text()
        return [row["step"] for row in csv.DictReader(text.splitlines()) if row["metric"] == "train_loss"]

    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny)
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert steps() == ["0", "1", "2", "3"]
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny)
    assert steps() == ["0", "1"]
