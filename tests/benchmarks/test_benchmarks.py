"""Each benchmark runs and writes its figures. How large they are is no matter of tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.models import tiny_llama
from torch import nn

from benchmarks import (
    chart,
    checkpoint,
    data,
    end_of_fit,
    harness,
    held,
    imports,
    inference,
    inject,
    memory,
    merge,
    monitor,
    quantized,
    scaling,
    step,
    throughput,
)
from lightning_lora.model.quantization import quantized_layers


def figures(main: Any, path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    main([*arguments, "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["settings"]
    return found["rows"]


def test_step(tmp_path: Path) -> None:
    rows = figures(step.main, tmp_path / "step.json", "--shape", "tiny", "--tokens", "8", "--turns", "2")
    assert list(rows) == ["floor", "ours, all", "PEFT, all", "ours, qv", "PEFT, qv", "full"]
    assert rows["floor"]["median"] == 1.0
    for row in rows.values():
        assert row.keys() == {"median", "low", "high", "seconds", "of full"}
        assert row["low"] <= row["median"] <= row["high"]


def test_a_step_of_compiled_blocks_without_full_fine_tuning(tmp_path: Path) -> None:
    models = harness.contenders(harness.SHAPES["tiny"], 2, ["all"], full=False)
    assert list(models) == ["floor", "ours, all", "PEFT, all"]
    for model in models.values():
        assert len(step.compiled_parts(model, "blocks")) == 2
        assert step.compiled_parts(model, "model") == [model]
        assert step.compiled_parts(model, None) == []
    arguments = ["--shape", "tiny", "--tokens", "8", "--turns", "2", "--targets", "qv", "--without-full"]
    rows = figures(step.main, tmp_path / "step.json", *arguments)
    assert list(rows) == ["floor", "ours, qv", "PEFT, qv"]
    assert all("of full" not in row for row in rows.values())


def test_memory(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--tokens", "8", "--targets", "all"]
    rows = figures(memory.main, tmp_path / "memory.json", *arguments)
    peaks = {name.split(": ")[1]: row["peak bytes"] for name, row in rows.items()}
    # Counted, not timed, so how they compare is sure.
    assert peaks["floor"] < peaks["ours, all"] <= peaks["PEFT, all"] < peaks["full"]
    layers = {name.split(": ")[1]: row["layer peak"] for name, row in rows.items()}
    assert layers["ours, all"] < 1.5 < layers["PEFT, all"]


@pytest.mark.parametrize("mixed", [[], ["--mixed"]])
def test_quantized(tmp_path: Path, mixed: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    kinds = ("float32", "bfloat16", "nf4-dq")
    arguments = ["--shape", "tiny", "--tokens", "8", "--turns", "2", "--kinds", *kinds, *mixed]
    rows = figures(quantized.main, tmp_path / "quantized.json", *arguments)
    assert list(rows) == [f"{kind}: {name}" for kind in kinds for name in ("floor", "ours", "PEFT")]
    at_rest = {name: row["resting bytes"] for name, row in rows.items()}
    for name in ("ours", "PEFT"):
        assert max(at_rest[f"{kind}: {name}"] for kind in kinds[1:]) < at_rest[f"float32: {name}"]
    for kind in kinds:
        assert at_rest[f"{kind}: ours"] == pytest.approx(at_rest[f"{kind}: PEFT"], rel=1e-3)  # or a few buffers
        assert rows[f"{kind}: ours"]["loss"] < rows[f"{kind}: floor"]["loss"]


def test_the_memory_of_a_step_on_a_base_in_four_bits() -> None:
    """At rest half a byte for each weight and its scales; at the peak, one layer's weight in full beside them."""
    pytest.importorskip("bitsandbytes")
    shape = harness.Shape(512, 1408, 4, 8, 8)
    models = quantized.contenders(shape, "nf4-dq", 8, "all", "cpu")
    linear = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
    packed = sum(storage.size(m, found) for _, m, storage, found in quantized_layers(models["floor"]))
    codes = 4 * 7 * 4 * (16 + 256)  # the code books of each layer
    assert (packed - codes) / linear == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)
    optimizer = harness.still_adamw(models["ours"])
    step = harness.stepper(models["ours"], shape, 32, optimizer)
    step()
    peak = harness.peak_bytes(step)
    assert peak < 4 * linear / 4  # far less than one block of the model in float32
    assert quantized.resting_bytes(models["ours"], optimizer) < 0.3 * 4 * linear


def test_a_peak_is_what_lives_at_once() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        for _ in range(3):
            torch.empty(1000)
        kept.append(torch.empty(500))
        torch.empty(100)

    assert harness.peak_bytes(call) == pytest.approx(4000, abs=64)


def test_checkpoint(tmp_path: Path) -> None:
    rows = figures(checkpoint.main, tmp_path / "checkpoint.json", "--shape", "tiny", "--turns", "2")
    assert rows["ours"]["bytes"] < rows["PEFT"]["bytes"] < rows["full"]["bytes"]
    assert all(row[what]["seconds"] > 0 for row in rows.values() for what in ("write", "read"))
    assert all("resume" in row for row in rows.values())


def test_merge(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--turns", "2", "--dtype", "bfloat16"]
    rows = figures(merge.main, tmp_path / "merge.json", *arguments)
    names = ["copy", "ours", "ours, to float32 and back", "ours, product", "ours, checksum", "PEFT"]
    assert list(rows) == [f"bfloat16: {name}" for name in names]
    assert rows["bfloat16: copy"]["peak over weights"] == pytest.approx(1.0, abs=0.05)
    assert all(row["bytes a second"] > 0 for row in rows.values())


def test_the_end_of_a_run(tmp_path: Path) -> None:
    rows = figures(end_of_fit.main, tmp_path / "end_of_fit.json", "--shape", "tiny")
    assert list(rows) == ["merge", "merge and export"]
    # At least the merged weights themselves are made, and never two more copies of them.
    assert all(1.0 <= row["peak over weights"] < 2.5 for row in rows.values())


def test_what_a_run_holds_is_what_was_predicted(tmp_path: Path) -> None:
    (row,) = figures(held.main, tmp_path / "held.json", "--shape", "small", "--tokens", "8").values()
    assert row["held bytes"] == pytest.approx(row["predicted bytes"], rel=1e-3)
    assert row["peak bytes"] > row["held bytes"]


def test_throughput(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--rows", "2", "--length", "8", "--turns", "1", "--steps", "2"]
    rows = figures(throughput.main, tmp_path / "throughput.json", *arguments)
    assert set(rows) == {name + where for name in ("ours", "PEFT") for where in throughput.LOSSES}
    for row in rows.values():
        assert row["tokens a second"] == pytest.approx(16 / row["seconds"])


def test_the_loss_at_learned_positions_is_the_loss() -> None:
    rows = torch.arange(16).view(2, 8)
    labels = rows.clone()
    labels[:, :5] = -100
    for model in (tiny_llama(), harness.theirs(tiny_llama(), 2, "all")):
        gradients = []
        for loss in throughput.LOSSES.values():
            model.zero_grad()
            found = loss(model, rows, labels)
            found.backward()
            gradients.append([found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_inference(tmp_path: Path) -> None:
    rows = figures(inference.main, tmp_path / "inference.json", "--shape", "tiny", "--turns", "2")
    assert list(rows) == ["base", "ours, merged", "PEFT, merged", "ours, beside", "PEFT, beside"]


def test_inject(tmp_path: Path) -> None:
    arguments = ["--meta", "tiny", "--shape", "tiny", "--turns", "2"]
    rows = figures(inject.main, tmp_path / "inject.json", *arguments)
    assert {"tiny, meta: ours", "tiny, cpu: PEFT", "tiny, cpu: one pass over the weights"} <= rows.keys()


def test_a_look_of_the_monitor(tmp_path: Path) -> None:
    rows = figures(monitor.main, tmp_path / "monitor.json", "--shape", "tiny", "--tokens", "8", "--turns", "2")
    assert rows["look"]["seconds"] > 0


def test_imports_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert imports.import_seconds("json", ", math") > 0
    monkeypatch.setattr(imports, "import_seconds", lambda package, before: float(len(package)))
    rows = figures(imports.main, tmp_path / "imports.json", "--turns", "1")
    assert rows["lightning_lora"]["seconds"] == len("lightning_lora")


def test_data_takes_the_figures_of_each_contender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"seconds": 1.0, "cpu_seconds": 2.0, "packs": 3, "bytes": 4}

    def measured(contender: str, path: Path, cache: Path, others: str) -> dict[str, float]:
        return found | {"lines": len(path.read_text().splitlines())}

    monkeypatch.setattr(data, "measured", measured)
    rows = figures(data.main, tmp_path / "data.json", "--rows", "7")
    assert list(rows) == ["ours", "ours, found again", "TRL"] and all(row["lines"] == 7 for row in rows.values())
    assert data.tree(os.getpid())[0] == os.getpid() and data.proportional_bytes(os.getpid()) > 10**7


def test_scaling_and_the_chart_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MIDDLE", {"rank": 2, "hidden": 64, "layers": 1, "tokens": 4})
    figures(step.main, tmp_path / "step.json", "--shape", "tiny", "--tokens", "4", "--turns", "2")
    for axis, value in {"rank": 4, "hidden": 128, "layers": 2, "tokens": 8}.items():
        path = tmp_path / f"scaling-{axis}.json"
        rows = figures(scaling.main, path, "--axis", axis, "--values", str(value), "--turns", "2")
        assert rows[str(value)].keys() == {"floor", "ours, all", "PEFT, all", "full"}
    chart.main(["--results", str(tmp_path)])
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_contenders_share_their_weights_and_differ_in_what_they_train() -> None:
    models = harness.contenders(harness.SHAPES["tiny"], 4, ["all", "qv"])
    pointers = {name: model.get_input_embeddings().weight.data_ptr() for name, model in models.items()}
    assert len(set(pointers.values())) == 1

    def trained(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert trained(models["floor"]) == 0
    assert trained(models["ours, all"]) == trained(models["PEFT, all"]) > trained(models["ours, qv"]) > 0
    assert trained(models["full"]) == sum(parameter.numel() for parameter in models["floor"].parameters())


@pytest.mark.slow
def test_faults(tmp_path: Path) -> None:
    """In a process of its own, since the runs are copies of it."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.faults",
        "--kills",
        "1",
        "--steps",
        "20",
        "--json",
        tmp_path / "x.json",
    ]
    done = subprocess.run(command, cwd=ROOT, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert list(rows) == ["one process", "ddp", "fsdp", "fsdp, sharded", "a long run"]
    for name in list(rows)[:-1]:
        assert (rows[name]["killed"], rows[name]["problems"]) == (1, [])
