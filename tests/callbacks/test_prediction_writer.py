"""Predictions in a file."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.failing_disk import FailingDisk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.callbacks import PredictionWriter
from lightning_lora.callbacks.prediction_writer import finished_rows, resumable_from


class Answers(L.LightningModule):
    fails = False

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[dict[str, Any]]:
        if self.fails and batch_idx:
            raise KeyError("no answer")
        return [{"y": y} for y in batch.tolist()]


def predict(folder: Path, module: L.LightningModule) -> None:
    writer = PredictionWriter(str(folder / "answers.jsonl"))
    rows = DataLoader(torch.arange(4), batch_size=2)
    toys.trainer(folder, [writer], logger=False).predict(module, rows, return_predictions=False)


def test_earlier_answers_stay_until_all_new_ones_are_there(tmp_path: Path) -> None:
    module = Answers()
    predict(tmp_path, module)
    expected = "".join(f'{{"y": {y}}}\n' for y in range(4))
    assert (tmp_path / "answers.jsonl").read_text() == expected
    module.fails = True
    with pytest.raises(KeyError, match="no answer"):
        predict(tmp_path, module)
    assert (tmp_path / "answers.jsonl").read_text() == expected
    assert (tmp_path / "answers.jsonl.partial").read_text() == '{"y": 0}\n{"y": 1}\n'
    module.fails = False
    predict(tmp_path, module)
    assert (tmp_path / "answers.jsonl").read_text() == expected
    assert not (tmp_path / "answers.jsonl.partial").exists()


class Texts(L.LightningModule):
    """Answers each row with a text that says which it is."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts, self.asked = texts, 0

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[dict[str, Any]]:
        self.asked += len(batch)
        return [{"row": row, "text": self.texts[row]} for row in batch.tolist()]


def answer(path: Path, texts: list[str], batch_size: int, resume: bool = False) -> int:
    """Answer all rows, or those that are left; return how many were asked."""
    start = resumable_from(path, batch_size) if resume else None
    module, rows = Texts(texts), DataLoader(torch.arange(len(texts))[start or 0 :], batch_size=batch_size)
    writer = PredictionWriter(str(path), start)
    toys.trainer(path.parent, [writer], logger=False).predict(module, rows, return_predictions=False)
    return module.asked


@given(texts=st.lists(st.text(max_size=6), min_size=1, max_size=9), batch_size=st.integers(1, 4), cut=st.floats(0, 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_was_written_is_gone_on_with(texts: list[str], batch_size: int, cut: float, tmp_path: Path) -> None:
    path, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    answer(path, texts, batch_size)
    expected = path.read_bytes()
    written = expected[: int(cut * len(expected))]  # by a run that was killed then, also in the middle of a letter
    path.unlink()
    partial.write_bytes(written)
    done = written.count(b"\n")
    asked = answer(path, texts, batch_size, resume=True)
    assert path.read_bytes() == expected and not partial.exists()
    assert len(texts) - done <= asked <= len(texts) - done + batch_size
    partial.write_bytes(written)
    others = [f"{text}!" for text in texts]
    if done:
        with pytest.raises(ValueError, match=r"are not what is predicted now: .* Leave out --resume"):
            answer(path, others, batch_size, resume=True)
        assert path.read_bytes() == expected and partial.read_bytes() == written[: written.rindex(b"\n") + 1]
    else:
        assert answer(path, others, batch_size, resume=True) == len(texts)


@given(texts=st.lists(st.text(max_size=6), min_size=2, max_size=6), batch_size=st.integers(1, 3), cut=st.floats(0, 1))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_failing_disk_takes_nothing_that_was_written(
    texts: list[str], batch_size: int, cut: float, tmp_path: Path
) -> None:
    path, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    answer(path, texts, batch_size)
    expected = path.read_bytes()
    written = expected[: int(cut * len(expected))]
    fails_at, failed = 0, True
    while failed:
        path.unlink(missing_ok=True)
        partial.write_bytes(written)
        before = finished_rows(partial)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(tmp_path, patch, fails_at)
            try:
                answer(path, texts, batch_size, resume=True)
            except OSError:
                assert path.exists() or finished_rows(partial)[: len(before)] == before
            else:
                assert path.read_bytes() == expected
        fails_at, failed = fails_at + 1, disk.failed
    assert fails_at > 3
