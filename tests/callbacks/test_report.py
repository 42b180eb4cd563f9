"""The page and the record that a fit leaves."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.recipe_runs import run
from helpers.toys import Toy, loader
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import LoRA
from lightning_lora.callbacks import Report
from lightning_lora.cli.main import main


class Noted(Toy):
    """Keeps the dense update of its one adapted layer as it is after the last step."""

    dense: Tensor

    def on_train_batch_end(self, *args: Any) -> None:
        layer: Any = self.net.base_model.model[4] if isinstance(self.net, peft.PeftModel) else self.net[4]
        found = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else None
        self.dense = (layer.lora["default"].delta_weight() if found is None else found).detach().double()


def record_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return found


@pytest.mark.parametrize("wrapped", [False, True], ids=["ours", "PEFT's"])
def test_an_own_module_without_a_data_module(tmp_path: Path, wrapped: bool) -> None:
    pytest.importorskip("plotly")
    model: Any = Noted(dropout=0.0)
    weight = model.net[4].weight.detach().double()
    lora = LoRA(summary=False) if wrapped else LoRA(r=3, target_modules=["net.4"], summary=False, modules_to_save=[])
    if wrapped:
        model.net = peft.get_peft_model(model.net, peft.LoraConfig(r=3, target_modules=["4"]))
    callbacks = [lora, LearningRateMonitor(), Report(tmp_path / "run")]
    toys.trainer(tmp_path, callbacks, logger=CSVLogger(tmp_path / "run"), max_epochs=2).fit(model, loader(), loader())
    record = record_of(tmp_path / "run")
    (update,) = record["updates"]
    assert update["r"] == 3 and update["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    expected = torch.linalg.svdvals(model.dense)[:3].tolist()
    assert update["values"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert [rows["purpose"] for rows in record["data"]] == ["training", "validation"]
    assert record["after"] and all(torch.isfinite(torch.tensor(list(record["after"].values()))))
    assert record["settings"]["trainer"]["epochs"] == 2
    assert "weights in memory" in record["outputs"][0]["name"] and record["outputs"][0]["bytes"] > 0
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert update["layer"] in page and "<script" in page


def test_a_recipe(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, "--trainer.num_sanity_val_steps", "-1")
    folder = tmp_path / "runs/chat_sft"
    record = record_of(folder)
    assert record["before"].keys() <= record["after"].keys() and "val_loss" in record["before"]
    training, validation = record["data"]
    assert training["rows"] > validation["rows"] > 0
    for rows in record["data"]:
        lengths = rows["lengths"]
        assert sum(lengths["counts"]) == lengths["texts"] >= 1
        assert 0 < lengths["learned"] < lengths["tokens"]
    assert record["settings"]["adapter default"]["r"] > 0
    assert {Path(each["path"]).name for each in record["outputs"]} >= {"adapter"}
    assert "merged outputs apart" in (folder / "export/adapter/README.md").read_text()
    page = (folder / "report.html").read_bytes()
    main(["report", "runs/chat_sft"])
    assert (folder / "report.html").read_bytes() == page


def test_without_plotly_the_record_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with caplog.at_level("INFO"):
        toys.trainer(tmp_path, [LoRA(r=2, summary=False), Report(tmp_path / "run")], max_epochs=1).fit(Toy(), loader())
    assert record_of(tmp_path / "run")["updates"]
    assert not (tmp_path / "run/report.html").exists()
    assert "pip install" in caplog.text


@pytest.mark.parametrize("how", ["fast_dev_run", "interrupted"])
def test_nothing_is_said_of_what_is_no_whole_fit(tmp_path: Path, how: str) -> None:
    class Stopped(Toy):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"fast_dev_run": True} if how == "fast_dev_run" else {"max_epochs": 1}
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False), Report(tmp_path / "run")], **settings)
    model = Toy() if how == "fast_dev_run" else Stopped()
    if how == "interrupted":
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(model, loader())
    else:
        trainer.fit(model, loader())
    assert not (tmp_path / "run").exists()
