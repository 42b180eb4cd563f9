"""Tokens a second, minutes left and peak memory, by a clock that the test winds."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRA
from lightning_lora.callbacks import Throughput, throughput
from lightning_lora.formats.curves import SPEED


class Clock:
    """Stands still unless a step or a validation takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


class Texts(toys.Toy):
    """Rows of ten tokens, the last three of them padding; a step takes two seconds, a validation sixty."""

    def __init__(self, clock: Clock, mask: bool = True) -> None:
        super().__init__()
        self.clock, self.mask = clock, mask

    def batches(self) -> DataLoader:
        rows: Any = []
        for index in range(8):
            row = {"input_ids": torch.full((10,), index)}
            rows.append({**row, "attention_mask": torch.tensor([1] * 7 + [0] * 3)} if self.mask else row)
        return DataLoader(rows, batch_size=2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 2
        return self.net(batch["input_ids"][:, :8].float()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 15


class Seen(L.Callback):
    def __init__(self) -> None:
        self.bar: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.progress_bar_metrics
        self.bar.append({name: float(value) for name, value in metrics.items() if name in SPEED})


def fit(tmp_path: Path, module: Any, **options: Any) -> list[dict[str, float]]:
    seen = Seen()
    callbacks = [LoRA(r=2, target_modules=["net.0"], summary=False, merge=None), Throughput(), seen]
    trainer = toys.trainer(tmp_path, callbacks, **{"num_sanity_val_steps": 0, "max_epochs": 2, **options})
    trainer.fit(module, module.batches(), module.batches())
    return seen.bar


@pytest.mark.parametrize(("mask", "tokens"), [(True, 14), (False, 20)])
def test_tokens_without_padding_over_the_time_of_a_batch(
    mask: bool, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = fit(tmp_path, Texts(Clock(monkeypatch), mask))
    assert [row["tokens_per_second"] for row in bar] == pytest.approx([tokens / 2] * 8)  # without the validation


def test_minutes_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = fit(tmp_path, Texts(Clock(monkeypatch)))
    expected = [7 * 2 / 60, 6 * 2 / 60, 5 * 2 / 60, 4 * 2 / 60, 3 * (10 + 60) / 5 / 60]
    assert [row["minutes_left"] for row in bar[:5]] == pytest.approx(expected)
    assert bar[-1]["minutes_left"] == 0


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_steps": 3, "max_epochs": -1}, 3),
        ({"max_steps": 3, "max_epochs": 2}, 3),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 1}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
    ],
)
def test_what_ends_a_run(
    options: dict[str, Any], batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = fit(tmp_path, Texts(Clock(monkeypatch)), limit_val_batches=0, **options)
    assert [row["minutes_left"] for row in bar] == pytest.approx([2 * (batches - 1 - i) / 60 for i in range(batches)])


def test_a_run_without_an_end_has_no_minutes_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = fit(tmp_path, Texts(Clock(monkeypatch)), max_epochs=-1, max_time={"seconds": 1}, limit_val_batches=0)
    assert bar and not any("minutes_left" in row for row in bar)


def test_rows_where_there_are_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers(toys.Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            clock.now += 4
            return super().training_step(batch, batch_idx)

        def batches(self) -> DataLoader:
            return toys.loader()

    clock = Clock(monkeypatch)
    bar = fit(tmp_path, Numbers(), max_epochs=1)
    assert [row["rows_per_second"] for row in bar] == pytest.approx([2.0] * 4)
    assert not any("tokens_per_second" in row for row in bar)


def test_peak_memory_is_that_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = fit(tmp_path, Texts(Clock(monkeypatch)), max_epochs=1)
    assert 0.1 < bar[-1]["peak_memory_gb"] < 1000
    before = throughput.peak_memory(torch.device("cpu"))
    block = torch.ones(100_000_000)
    after = throughput.peak_memory(torch.device("cpu"))
    assert before is not None and after is not None
    assert after >= before and after >= block.numel() * 4


def test_it_is_logged_and_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    clock, seen = Clock(monkeypatch), Seen()
    for epochs, ckpt_path in ((1, None), (3, tmp_path / "last.ckpt")):
        module, logger = Texts(clock), CSVLogger(tmp_path)
        lora = LoRA(r=2, target_modules=["net.0"], summary=False, merge=None)
        callbacks = [lora, Throughput(), seen, ModelCheckpoint(tmp_path, save_last=True)]
        settings: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "limit_val_batches": 0}
        toys.trainer(tmp_path, callbacks, max_epochs=epochs, **settings).fit(
            module, module.batches(), ckpt_path=ckpt_path, weights_only=True
        )
    assert seen.bar[4]["minutes_left"] == pytest.approx(7 * 2 / 60)  # 12 batches, of which this run trains 8
    assert "tokens_per_second" in (Path(logger.log_dir) / "metrics.csv").read_text()
