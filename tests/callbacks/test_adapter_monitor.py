"""What adapters learn is logged, and said at the end."""

import csv
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.distributed.processes import run_processes
from helpers.toys import Toy, loader
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import LoRA
from lightning_lora.callbacks import AdapterMonitor
from lightning_lora.callbacks.adapter_monitor import dead_components


class Watched(Toy):
    """Notes the dense update and the gradients of one layer at each step, as they would be computed plainly."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.updates: list[Tensor] = []
        self.gradients: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(float(self.net[4].lora["default"].lora_A.grad.norm()))

    def on_train_batch_end(self, *args: Any) -> None:
        self.updates.append(self.net[4].lora["default"].delta_weight().detach().double().clone())


def logged(path: Path) -> list[dict[str, str]]:
    (table,) = path.rglob("metrics.csv")
    with table.open() as file:
        return [row for row in csv.DictReader(file) if row["adapter/net/stable_rank"]]


def fit(path: Path, model: Any, *, every: int = 2, r: int = 4, **settings: Any) -> AdapterMonitor:
    monitor = AdapterMonitor(every)
    callbacks = [LoRA(r=r, target_modules=["net.4"], summary=False, modules_to_save=[], **settings), monitor]
    trainer = toys.trainer(path, callbacks, logger=CSVLogger(path), max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, loader())
    return monitor


def test_figures_are_those_of_the_dense_update(tmp_path: Path) -> None:
    model = Watched()
    weight = model.net[4].weight.detach().clone()
    fit(tmp_path, model)
    rows = logged(tmp_path)
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    changes = [two - one for one, two in zip(model.updates[1::2], model.updates[3::2])]
    for number, row in enumerate(rows):
        dense = model.updates[2 * number + 1]
        values = torch.linalg.svdvals(dense)[:4]
        shares = values / values.sum()
        expected = {
            "update_norm": dense.norm() / weight.norm(),
            "update_spectral_norm": values[0] / weight.norm(),
            "stable_rank": (dense.norm() / values[0]) ** 2,
            "effective_rank": math.exp(-(shares * shares.log()).sum()),
            "grad_norm_A": model.gradients[2 * number + 1],
        }
        if number > 1:
            expected["update_cosine"] = torch.cosine_similarity(
                changes[number - 1].flatten(), changes[number - 2].flatten(), 0
            )
        for name, value in expected.items():
            assert float(row[f"adapter/net/{name}"]) == pytest.approx(float(value), rel=1e-3), name


def test_nothing_is_trained_otherwise(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [AdapterMonitor(1)]):
        model = Toy()
        torch.manual_seed(3)
        lora = LoRA(r=2, summary=False)
        toys.trainer(tmp_path, [lora, *callbacks], logger=CSVLogger(tmp_path), max_epochs=1).fit(model, loader())
        ends.append(toys.snapshot(model))
    toys.assert_same_tensors(*ends)


def test_dead_components() -> None:
    A, B = torch.ones(4, 5), torch.ones(6, 4)
    assert dead_components((A, B)) == 0
    B[:, 0] = 0
    A[1] *= 1e-5
    assert dead_components((A, B)) == 0.5
    assert dead_components((A, 0 * B)) == 1


def test_advice_is_printed_and_in_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(dropout=0.0, lr=0.1)
    with caplog.at_level("INFO"):
        monitor = fit(tmp_path, model, r=8, export_dir=tmp_path / "export")
    assert monitor.advice
    assert "What the adapters learned:\n- " in caplog.text
    assert all(line in (tmp_path / "export" / "adapter" / "README.md").read_text() for line in monitor.advice)


def test_nothing_to_look_at(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, [AdapterMonitor()], logger=CSVLogger(tmp_path))
    with pytest.raises(ValueError, match="found no adapter to look at"):
        trainer.fit(Toy(), loader())


def test_adapters_of_peft(tmp_path: Path) -> None:
    model: Any = Toy(dropout=0.0)
    model.net = peft.get_peft_model(model.net, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["4"]))
    callbacks = [LoRA(summary=False), AdapterMonitor(2)]
    trainer = toys.trainer(tmp_path, callbacks, logger=CSVLogger(tmp_path), max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, loader())
    (table,) = tmp_path.rglob("metrics.csv")
    with table.open() as file:
        last = [row for row in csv.DictReader(file) if row["adapter/net/stable_rank"]][-1]
    layer = model.net.base_model.model[4]
    update = layer.get_delta_weight("default").detach().double()
    values = torch.linalg.svdvals(update)
    assert float(last["adapter/net/update_norm"]) == pytest.approx(float(update.norm() / layer.weight.norm()), rel=1e-3)
    assert float(last["adapter/net/stable_rank"]) == pytest.approx(float((update.norm() / values[0]) ** 2), rel=1e-3)
    assert float(last["adapter/net/grad_norm_B"]) > 0


def test_no_such_interval() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0, expected 1 or more"):
        AdapterMonitor(0)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_sharded_as_in_one_process(strategy: str, tmp_path: Path) -> None:
    (alone,) = run_processes("jobs.monitored", str(tmp_path / "one"), "one", world_size=1)
    found, _ = run_processes("jobs.monitored", str(tmp_path / strategy), strategy)
    assert found["figures"].keys() == alone["figures"].keys()
    for name, value in alone["figures"].items():
        assert found["figures"][name] == pytest.approx(value, rel=1e-2, abs=1e-5), name
