"""What adapters learn is logged, and said at the end."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.distributed.processes import run_processes
from helpers.toys import Toy, loader
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import LoRA
from lightning_lora.callbacks import AdapterMonitor
from lightning_lora.callbacks.adapter_monitor import (
    _Layer,
    advice_on,
    dead_components,
    group_of,
    spectrum_of,
)


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


def test_what_singular_values_say() -> None:
    even = spectrum_of(torch.tensor([2.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    assert even == pytest.approx((4.0, 2.0, 4.0, 4.0, 4))
    one = spectrum_of(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))
    assert one == pytest.approx((3.0, 3.0, 1.0, 1.0, 1))
    assert spectrum_of(torch.zeros(3)) == (0, 0, 0, 0, 0)


def test_dead_components() -> None:
    A, B = torch.ones(4, 5), torch.ones(6, 4)
    assert dead_components((A, B)) == 0
    B[:, 0] = 0
    A[1] *= 1e-5
    assert dead_components((A, B)) == 0.5
    assert dead_components((A, 0 * B)) == 1


@pytest.mark.parametrize(
    ("name", "group"), [("model.layers.0.self_attn.q_proj", "q_proj"), ("net.4", "net"), ("0", "0"), ("", "")]
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


class Sixteen:
    r = 16


def layers(**values: list[float]) -> list[Any]:
    return [(_Layer(n.replace("__", "."), Sixteen(), 10.0), spectrum_of(torch.tensor(v))) for n, v in values.items()]  # type: ignore[arg-type]


def test_advice() -> None:
    small = [0.5, 0.3] + [1e-4] * 14
    (line,) = advice_on(layers(a__0__q=small, a__1__q=small))
    assert line.startswith("q uses 2.0 of 16 ranks: r=2 would hold 99%")
    (line,) = advice_on(layers(a__0__q=[0.5] * 16))
    assert line.startswith("The update of a.0.q is 20% of its weight's norm")
    (line,) = advice_on(layers(a__0__q=[0.2] * 16, a__1__q=[0.2] * 16, a__2__q=[1e-4] * 16))
    assert line.startswith("1 of 3 layers moved less than 1% of the median, the first is a.2.q")
    assert advice_on(layers(a__0__q=[0.2] * 16)) == advice_on([]) == advice_on(layers(q=[0.0] * 16)) == []


def test_advice_is_printed_and_in_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(dropout=0.0, lr=0.1)
    with caplog.at_level("INFO"):
        monitor = fit(tmp_path, model, r=8, export_dir=tmp_path / "export")
    assert monitor.advice
    assert "What the adapters learned:\n- " in caplog.text
    assert all(line in (tmp_path / "export" / "adapter" / "README.md").read_text() for line in monitor.advice)


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
