"""What Lightning's loggers get, kept by the real packages on this machine's disk."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.toys import Toy, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_lora import LoRA
from lightning_lora.callbacks import AdapterMonitor, LearningCurve, Report

Found = tuple[dict[str, list[float]], dict[str, Path]]  # figures and files, by name


def tensorboard(path: Path) -> tuple[Logger, Callable[[], Found]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kept() -> Found:
        (events,) = path.rglob("events.out.tfevents.*")
        found = EventAccumulator(str(events)).Reload()
        figures = {tag: [e.value for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
        picture = path / "kept.png"
        picture.write_bytes(found.Images("learning_curve")[0].encoded_image_string)
        return figures, {"learning_curve.png": picture}

    return TensorBoardLogger(path), kept


def mlflow(path: Path) -> tuple[Logger, Callable[[], Found]]:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"file:{path}", log_model="all")

    def kept() -> Found:
        client, run = logger.experiment, logger.run_id
        names = client.get_run(run).data.metrics
        figures = {name: [m.value for m in client.get_metric_history(run, name)] for name in names}
        return figures, {file.name: file for file in path.rglob("artifacts/**/*") if file.is_file()}

    return logger, kept


def wandb(path: Path) -> tuple[Logger, Callable[[], Found]]:
    package = pytest.importorskip("wandb")
    path.mkdir()
    logger = WandbLogger(save_dir=path, offline=True)

    def kept() -> Found:
        # Nothing public reads the history of an offline run; the summary is the last of it.
        summary = logger.experiment.summary
        figures = {name: [summary[name]] for name in summary.keys()}  # noqa: SIM118  # it is no mapping
        package.finish()
        return figures, {file.name: file for file in path.rglob("files/*.*")}

    return logger, kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", [tensorboard, mlflow, wandb])
def test_figures_and_files_arrive(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    logger, kept = kind(tmp_path / "logger")
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="saved")
    lora = LoRA(r=4, target_modules=["net.4"], summary=False)
    callbacks = [lora, AdapterMonitor(2), saver, LearningCurve(), Report(tmp_path / "run")]
    loggers = [CSVLogger(tmp_path / "csv"), logger]
    toys.trainer(tmp_path, callbacks, logger=loggers, max_epochs=2, enable_checkpointing=True).fit(Toy(), loader())

    figures, files = kept()
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("adapter/")]
    assert len(names) == 8
    for name in names:
        expected = [float(row[name]) for row in rows if row[name]]
        assert len(expected) >= 2
        assert figures[name] == pytest.approx(expected[-1:] if kind is wandb else expected, rel=1e-5)
    assert files["learning_curve.png"].read_bytes().startswith(b"\x89PNG")
    if kind is not tensorboard:  # which keeps no files
        assert files["report.html"].read_bytes() == (tmp_path / "run/report.html").read_bytes()
    if kind is mlflow:  # Lightning gives W&B no checkpoints where it is offline
        saved = next(file for name, file in files.items() if name.endswith(".ckpt"))
        state = torch.load(saved, weights_only=True)["state_dict"]
        assert state and all("lora_" in name for name in state)
