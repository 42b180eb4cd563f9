"""Predictions in a file."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.callbacks import PredictionWriter


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
    assert not (tmp_path / "answers.jsonl.partial").exists()
