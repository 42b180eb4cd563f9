"""Whole runs: what is measured of them, how they go on after an interruption, and that they are the same training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import word_checkpoint

from benchmarks import chart, products
from benchmarks.end_to_end import __main__ as program
from benchmarks.end_to_end.contenders import CONTENDERS, Run, measure, recipe
from benchmarks.end_to_end.start import same_start
from benchmarks.end_to_end.summary import cells, summary
from benchmarks.harness import SHAPES, base, ours, theirs


def run(contender: str = "ours", **changed: Any) -> Run:
    settings = {"length": 64, "rows": 2, "warm_up": 1, "steps": 2, "turn": 0, "dropout": 0.0, "isa": "here"}
    return Run(**{"task": "chat", "contender": contender, **settings, **changed})


def figures(contender: str, checkpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    tokens = measure(run(contender), checkpoint, str(folder / "figures.json"))
    return {**json.loads(Path("figures.json").read_text()), "tokens": tokens}


def test_the_recipe_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures("ours", word_checkpoint(tmp_path / "model"), tmp_path / "run", monkeypatch)
    assert len(found["losses"]) == 3 and found["losses"][-1] != found["losses"][0]
    assert 0 < found["resting_bytes"] <= found["peak_bytes"]
    assert found["seconds"] > 0 and 0 < found["tokens"] <= 2 * 2 * 64


@pytest.mark.parametrize("contender", list(CONTENDERS["chat"])[1:])
def test_losses_are_those_of_trl(contender: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    checkpoint = word_checkpoint(tmp_path / "model")
    expected = figures(contender, checkpoint, tmp_path / "theirs", monkeypatch)
    found = figures("ours", checkpoint, tmp_path / "ours", monkeypatch)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert (found["tokens"], found["trained"]) == (expected["tokens"], expected["trained"])


def test_what_is_left_out_of_a_recipe() -> None:
    settings = recipe(run(dropout=0.25), "base", "figures.json")
    names = [each["class_path"].rpartition(".")[2] for each in settings["trainer"]["callbacks"]]
    assert names[0] == "LoRA" and names[-1] == "MeterCallback" and not {"BeforeAfter", "Report"} & {*names}
    assert settings["trainer"]["callbacks"][0]["init_args"]["lora_dropout"] == 0.25
    assert settings["model"]["init_args"]["pretrained"] == "base" and "gguf_file" not in settings["model"]["init_args"]


def test_both_adapters_start_at_the_same_values() -> None:
    models = [ours(base(SHAPES["tiny"]), 4, "all"), theirs(base(SHAPES["tiny"]), 4, "all")]
    starts = []
    for model in models:
        same_start(model)
        starts.append([p.clone() for name, p in model.named_parameters() if ".lora_A" in name])
    assert len(starts[0]) == 14 and all(map(torch.equal, *starts))
    assert not torch.equal(starts[0][0], starts[0][1])


def made(given: Run, bases: Path, seconds: float) -> dict[str, Any]:
    """A run that took twice as long and a half more memory for all but ours."""
    slower = 1 + (given.contender != "ours")
    peak = 3.0e9 if slower == 1 else 4e9
    numbers = {"cpu_seconds": 10.0 * slower, "seconds": 20.0 * slower, "peak_bytes": peak, "resting_bytes": 1e9}
    return {**asdict(given), **numbers, "tokens": 1000, "trained": 7, "losses": [2.0, 1.0], "load": 0.0}


def test_runs_go_on_where_they_stopped_and_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "save_bases", lambda folder, labels: None)
    count = 0

    def interrupted(*given: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return made(*given)

    monkeypatch.setattr(program, "run_apart", interrupted)
    arguments = ["--turns", "2", "--runs", str(tmp_path / "runs.jsonl"), "--json", str(tmp_path / "end_to_end.json")]
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments)
    program.main(arguments)
    planned = list(program.plan(list(program.PARTS), 2, torch.backends.cpu.get_cpu_capability(), 3))
    assert count == len(planned) + 1  # the one that was interrupted is made again
    assert [
        Run(**{key: row[key] for key in asdict(planned[0])}) for row in program.read(tmp_path / "runs.jsonl")
    ] == planned
    program.main(arguments)
    assert count == len(planned) + 1
    found = json.loads((tmp_path / "end_to_end.json").read_text())["rows"]
    name = next(name for name in found if name.endswith("4 x 256: TRL"))
    assert found[name]["ours over it"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert found[name]["ours of its peak"] == 0.75 and found[name]["difference of losses"] == 0.0
    assert cells(found[name]) == ("50.0", "2.00 (2.00 - 2.00)", "4.00", "3.00", "0.75, 0.67", "0.0e+00")
    for file in (chart.RESULTS / name for name in ("step.json", *(f"scaling-{axis}.json" for axis in chart.AXES))):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    chart.main(["--results", str(tmp_path)])
    assert (tmp_path / "end_to_end.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_without_ours_beside_it_has_no_ratio() -> None:
    (row,) = summary([made(run("TRL"), Path(), 0)]).values()
    assert "ours over it" not in row and cells(row)[1] == ""


def test_products_alone(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--packs", "1", "--length", "16", "--row", "8", "--turns", "2"]
    products.main([*arguments, "--json", str(tmp_path / "products.json")])
    rows = json.loads((tmp_path / "products.json").read_text())["rows"]
    assert list(rows) == ["step", "products", "products and attention"] and rows["step"]["median"] == 1.0
