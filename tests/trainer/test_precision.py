"""Which precision fits a machine, whatever machine this is."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import toys
from helpers.recipe_runs import RECIPES, printed, run

from lightning_lora import LoRA
from lightning_lora.cli.main import main
from lightning_lora.trainer import precision
from lightning_lora.trainer.precision import fitting_precision, slowdown

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    slowdown.cache_clear()
    yield
    slowdown.cache_clear()


def with_seconds(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[torch.dtype]:
    """Have products take so long by their type; what was measured is in the list."""
    measured = []

    def found(dtype: torch.dtype, device: torch.device) -> float:
        measured.append(dtype)
        return seconds[str(dtype).removeprefix("torch.")]

    monkeypatch.setattr(precision, "_seconds", found)
    return measured


def with_gpu(monkeypatch: pytest.MonkeyPatch, bfloat16: bool | None) -> None:
    """A machine with a GPU that has the instructions or not, or with none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bfloat16 is not None)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("accelerator", "bfloat16", "expected"),
    [
        *((name, True, "bf16-mixed") for name in ("auto", "gpu", "cuda")),
        *((name, False, "16-mixed") for name in ("auto", "gpu", "cuda")),
        ("cpu", True, "32-true"),
        ("auto", None, "32-true"),
        ("tpu", None, "32-true"),
    ],
)
def test_by_what_the_hardware_says(
    accelerator: str, bfloat16: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, bfloat16)
    with_seconds(monkeypatch, float32=1.0, bfloat16=28.0)
    assert fitting_precision(accelerator)[0] == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "bf16-mixed"), (1.2, "32-true"), (28.4, "32-true")])
def test_by_what_a_product_takes(seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, None)
    with_seconds(monkeypatch, float32=1.0, bfloat16=seconds)
    chosen, reason = fitting_precision("auto")
    assert chosen == expected
    assert f"{seconds:.2g} times as long as in float32" in reason


def test_a_slow_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated type may be slow in one product alone: all three of a layer's training are timed, in each type."""
    timed = []

    class Counted(precision.Timer):
        def timeit(self, number: int = 1) -> Any:
            timed.append((self._task_spec.stmt, self._task_spec.num_threads))
            return super().timeit(number)

    monkeypatch.setattr(precision, "Timer", Counted)
    assert slowdown(torch.bfloat16, CPU) > 0
    assert set(timed) == {("x @ weight.T", 1), ("grad @ weight", 1), ("grad.T @ x", 1)}
    once = len(timed)
    assert slowdown(torch.bfloat16, CPU) > 0 and len(timed) == once  # measured once


def test_the_command_line_chooses_prints_and_saves(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    with_gpu(monkeypatch, None)
    with_seconds(monkeypatch, float32=1.0, bfloat16=28.4)
    left_out = [*tiny[: tiny.index("--trainer.precision")], *tiny[tiny.index("--trainer.precision") + 2 :]]
    with caplog.at_level("INFO"):
        run(tmp_path, monkeypatch, "fit", "chat_sft", *left_out)
    (line,) = [message for message in caplog.messages if "precision" in message]
    assert line.startswith("precision: 32-true, since a product in bfloat16 takes 28 times as long")
    (saved,) = (tmp_path / "runs/chat_sft/logs").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["precision"] == "32-true"


@pytest.mark.parametrize("given", ["32-true", "bf16-mixed", "64"])
def test_what_is_set_is_kept(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "fit", "--config", "chat_sft")["trainer"]["precision"] == "auto"
    assert printed(capsys, "fit", "--config", "seq2seq")["trainer"]["precision"] == "auto"  # which leaves it out
    found = printed(capsys, "fit", "--config", "chat_sft", "--trainer.precision", given)["trainer"]["precision"]
    assert str(found) == given


@pytest.mark.parametrize("own", ["plugin", "accelerator"])
def test_a_precision_of_ones_own_is_left_alone(
    own: str, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = with_seconds(monkeypatch, float32=1.0, bfloat16=0.5)
    where = {
        "plugin": ["--trainer.plugins+=lightning.pytorch.plugins.DoublePrecision", "--trainer.accelerator", "cpu"],
        "accelerator": ["--trainer.accelerator", "{class_path: lightning.pytorch.accelerators.CPUAccelerator}"],
    }[own]
    arguments = [*tiny, "--trainer.precision", "auto", *where, "--trainer.logger", "false"]
    arguments += ["--trainer.callbacks", "lightning_lora.LoRA"]
    run(tmp_path, monkeypatch, "fit", "chat_sft", *arguments)
    assert not measured


def test_processes_by_the_same_command_line_do_not_choose_again(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, None)
    measured = with_seconds(monkeypatch, float32=1.0, bfloat16=0.5)
    monkeypatch.chdir(tmp_path)
    arguments = ["lightning-lora", "fit", "--config", str(RECIPES / "chat_sft.yaml"), *tiny]
    monkeypatch.setattr(sys, "argv", [*arguments, "--trainer.precision", "auto"])
    main()
    assert sys.argv[-2:] == ["--trainer.precision", "bf16-mixed"]
    slowdown.cache_clear()
    measured.clear()
    monkeypatch.setattr("lightning_lora.callback.warn_of_emulation", lambda trainer: None)
    main()  # as Lightning starts the others
    assert not measured


def fit(tmp_path: Path, given: Any, *more: LoRA) -> list[str]:
    """The warnings of emulation in a run of the callback alone."""
    lora = LoRA(r=2, target_modules=["net.0", "net.4"], summary=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.trainer(tmp_path, [lora, *more], precision=given, max_steps=2).fit(toys.Toy(), toys.loader())
    return [str(each.message) for each in caught if "only emulates" in str(each.message)]


def test_the_callback_warns_once_of_an_emulated_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_seconds(monkeypatch, float32=1.0, bfloat16=27.6, float16=9.0)
    other = LoRA(r=2, target_modules=["net.6"], summary=False)
    (warning,) = fit(tmp_path, "bf16-mixed", other)
    assert "precision='bf16-mixed'" in warning and "28 times as long" in warning and "'32-true'" in warning


def test_the_callback_says_nothing_of_a_precision_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = with_seconds(monkeypatch, float32=1.0, bfloat16=0.5)
    assert fit(tmp_path, "bf16-mixed") == [] and measured
    measured.clear()
    assert fit(tmp_path, "32-true") == [] and not measured  # nothing to measure
