from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora.callbacks.before_after import BeforeAfter


class Speaker(L.LightningModule):
    """One weight, said aloud; a second layer shares it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.tied = nn.Linear(1, 1, bias=False)
        self.tied.weight = self.layer.weight
        nn.init.ones_(self.layer.weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)

    def generate(self, prompt: str, max_new_tokens: int = 40) -> str:
        return f"[{prompt}] {self.layer.weight.item():.2f}"


class Exporter(L.Callback):
    """Stands for a callback that writes its export at the end of a fit."""

    def __init__(self, folder: Path) -> None:
        self.export_dir = str(folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in ("adapter", "merged"):
            (Path(self.export_dir) / name).mkdir(parents=True)
            (Path(self.export_dir) / name / "weights").write_bytes(bytes(20_000))


def fit(tmp_path: Path, *callbacks: L.Callback, sanity: int = -1, **options: object) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=sanity,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,  # type: ignore[arg-type]
    )
    loader = DataLoader(torch.ones(2, 1))  # type: ignore[arg-type]
    trainer.fit(Speaker(), loader, loader)
    return trainer


def test_reports_metric_sample_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    report = BeforeAfter("word")
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", save_last=True)
    fit(tmp_path, report, checkpoint, Exporter(tmp_path / "export"))
    assert report.metric_before == pytest.approx(1.0)
    assert report.metric_after == pytest.approx(0.25**2)
    assert (report.sample_before, report.sample_after) == ("[word] 1.00", "[word] 0.25")
    output = capsys.readouterr().out
    for text in ("1.0000", "0.0625", "2.7", "1.1", "[word] 1.00", "[word] 0.25", "newest checkpoint", "last.ckpt"):
        assert text in output
    for name in ("adapter", "merged"):
        (line,) = [line for line in output.splitlines() if f"exported {name}" in line]
        assert "0.02 MB" in line and str(tmp_path / "export" / name) in line


def test_warns_without_sanity_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = BeforeAfter("word")
    with pytest.warns(UserWarning, match="num_sanity_val_steps to -1"):
        fit(tmp_path, report, sanity=0, enable_checkpointing=False)
    assert report.sample_before is None and report.sample_after == "[word] 0.25"
    assert "perplexity" in capsys.readouterr().out


def test_warns_of_partial_sanity_check(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not measured on the same rows"):
        fit(tmp_path, BeforeAfter("word"), sanity=1, enable_checkpointing=False)


def test_counts_shared_weights_once() -> None:
    from lightning_lora.callbacks.outputs import weight_bytes

    assert weight_bytes(Speaker()) == 4


def test_module_must_generate() -> None:
    with pytest.raises(TypeError, match="no method generate"):
        BeforeAfter("word").setup(L.Trainer(accelerator="cpu", logger=False), L.LightningModule(), "fit")
