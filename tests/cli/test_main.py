"""The command line: overrides, recipes by name, predictions, finders."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT
from helpers.recipe_runs import RECIPES, printed, run

from lightning_lora.cli import help
from lightning_lora.cli.main import main
from lightning_lora.cli.runs import LoraCLI


def test_help_is_quick_and_names_every_command() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lightning_lora", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - start < 3
    assert done.returncode == 0 and done.stdout == help.HELP
    commands = [line.split()[0] for line in done.stdout.split("commands:\n")[1].split("\n\n")[0].splitlines()]
    assert commands == [*help.RUNS, *help.REPORTS, *help.RECIPES, *help.ADAPTER_FILES]
    assert [name.replace("show_data", "data") for name in LoraCLI.subcommands()] == [*help.RUNS]


@pytest.mark.parametrize("command", help.RUNS)
def test_help_of_a_run_is_quick(command: str) -> None:
    start = time.perf_counter()
    arguments = [sys.executable, "-m", "lightning_lora", command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - start < 3
    assert done.stdout.startswith(f"usage: lightning-lora {command} ")


def test_help_names_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"N": "2", "X": "0.5", "ID": "my/model", "FILE": "my.jsonl"}
    options = re.findall(r'(--(?:seed|trainer|model|data|lora)[\w.]+) ("[^"]+"|\S+)', help.run_help("fit"))
    values = {option: sample.get(value, value.strip('"')) for option, value in options if not option.endswith(".help")}
    assert len(values) == 15
    config = printed(capsys, "fit", "--config", "chat_sft", *(part for pair in values.items() for part in pair))
    assert config["trainer"]["max_steps"] == 2 and config["data"]["init_args"]["path"] == "my.jsonl"
    for option, value in options:
        if option.endswith(".help"):
            with pytest.raises(SystemExit):
                main(["fit", option, value])
            assert f"Help for {option}={value}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    assert "--trainer.accumulate_grad_batches" in capsys.readouterr().out


def test_print_config_with_comments_is_a_file_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = printed(capsys, "fit", "--config", "chat_sft")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "chat_sft", "--print_config=comments"])
    text = capsys.readouterr().out
    for comment in ("# Rank of the update", "# Longest row, in tokens.", "# Share of the rows of ``path`` held out"):
        assert comment in text
    (tmp_path / "mine.yaml").write_text(text)
    assert printed(capsys, "fit", "--config", str(tmp_path / "mine.yaml")) == plain


def test_print_config_is_complete_and_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "fit", "--config", "chat_sft", "--trainer.max_steps", "50", "--model.lr", "2e-3")
    assert config["trainer"]["max_steps"] == 50 and config["trainer"]["accumulate_grad_batches"] == 1
    assert config["model"]["init_args"]["lr"] == 2e-3
    lora = config["trainer"]["callbacks"][0]["init_args"]
    assert lora["r"] == 16 and lora["use_dora"] is False
    assert config["data"]["init_args"]["packing"] is True


def test_lora_is_changed_by_its_own_option(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--lora.r", "3", "--lora.target_modules", "[q_proj]", "--lora.rank_pattern", "{layers.0.*: 2}"]
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, *arguments)
    state = torch.load(tmp_path / "runs/chat_sft/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert [tuple(state[name].shape) for name in sorted(state) if "lora_A" in name] == [(2, 32), (3, 32)]
    (saved,) = (tmp_path / "runs/chat_sft/logs").rglob("config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["trainer"]["callbacks"][0]["init_args"]["r"] == 3
    assert config.get("lora") is None


def test_wrong_options_are_errors(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Found --lora\.rank, expected one of .*lora_alpha"):
        run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, "--lora.rank", "3")
    with pytest.raises(ValueError, match="no LoRA callback in the config"):
        run(tmp_path, monkeypatch, "fit", "full_finetune", "--lora.r", "3")
    with pytest.raises(ValueError, match="Found --output with fit"):
        run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, "--output", "a.jsonl")


def test_recipes_are_listed_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    main(["recipes"])
    out = capsys.readouterr().out
    assert all(path.stem in out for path in RECIPES.glob("*.yaml"))
    main(["recipes", "copy", "quickstart"])
    assert (tmp_path / "quickstart.yaml").read_text() == (RECIPES / "quickstart.yaml").read_text()
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "quickstart"])
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "quickstar"])


def test_a_file_of_ones_own_goes_before_a_recipe_of_that_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / "quickstart.yaml").read_text()
    Path("quickstart.yaml").write_text(text.replace("lr: 1.5e-3", "lr: 0.25"))
    assert printed(capsys, "fit", "--config=quickstart.yaml")["model"]["init_args"]["lr"] == 0.25
    Path("quickstart").mkdir()  # which is no file
    assert printed(capsys, "fit", "--config=quickstart")["model"]["init_args"]["lr"] == 1.5e-3


def test_goes_on_from_the_last_checkpoint_and_predicts(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny)
    last = tmp_path / "runs/chat_sft/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    Path("questions.csv").write_text("prompt\nw1 w2\nw3\n")
    arguments = ["--data.predict_path", "questions.csv", "--output", "out/answers.jsonl", "--ckpt_path", "last"]
    arguments += ["--model.max_new_tokens", "4", "--data.batch_size", "1"]
    run(tmp_path, monkeypatch, "predict", "chat_sft", *tiny, *arguments)
    answers = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    assert [answer["question"][0]["content"] for answer in answers] == ["w1 w2", "w3"]
    assert all(isinstance(answer["answer"], str) for answer in answers)
    written = Path("out/answers.jsonl").read_text()
    partial = Path("out/answers.jsonl.partial")
    partial.write_text(written.splitlines(keepends=True)[0] + '{"half')
    run(tmp_path, monkeypatch, "predict", "chat_sft", *tiny, *arguments, "--resume", "true")
    assert Path("out/answers.jsonl").read_text() == written
    partial.write_text('{"question": "another"}\n')
    with pytest.raises(ValueError, match="not what is predicted now"):
        run(tmp_path, monkeypatch, "predict", "chat_sft", *tiny, *arguments, "--resume", "true")
    with pytest.raises(ValueError, match="Found --resume with fit and no --output"):
        run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny, "--resume", "true")


def with_callback(folder: Path, callback: dict[str, Any]) -> str:
    """A copy of a recipe with one callback more."""
    recipe = yaml.safe_load((RECIPES / "chat_sft.yaml").read_text())
    recipe["trainer"]["callbacks"].append(callback)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def test_early_stopping(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stop = {"monitor": "val_loss", "patience": 0, "min_delta": 100.0}
    recipe = with_callback(tmp_path, {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop})
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", recipe, *tiny, "--trainer.max_steps", "20"])
    state = torch.load(tmp_path / "runs/chat_sft/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4  # the second validation is the first that does not improve


def test_the_best_checkpoint_by_the_monitor_is_kept(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((RECIPES / "chat_sft.yaml").read_text())
    recipe["trainer"]["callbacks"][1]["init_args"]["mode"] = "max"  # of a loss that falls, so that the last is not best
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "recipe.yaml", *tiny, "--trainer.max_steps", "6", "--model.lr", "0.1"])
    folder = tmp_path / "runs/chat_sft/checkpoints"
    rows = list(csv.DictReader((folder / "learning_curve.csv").read_text().splitlines()))
    losses = {int(row["step"]) + 1: float(row["value"]) for row in rows if row["metric"] == "val_loss"}
    best = max(losses, key=losses.__getitem__)
    assert len(losses) == 3 and best < 6
    (kept,) = (path for path in folder.glob("*.ckpt") if path.name != "last.ckpt")
    assert torch.load(kept, weights_only=True)["global_step"] == best
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("name", "settings", "changed"),
    [
        ("LearningRateFinder", {"num_training_steps": 30, "min_lr": 1e-5}, "lr"),
        ("BatchSizeFinder", {"max_trials": 2, "steps_per_trial": 1, "init_val": 1}, "batch_size"),
    ],
)
def test_finders(
    name: str, settings: dict[str, Any], changed: str, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_lora.tasks import CausalLM

    found: dict[str, Any] = {}

    def on_train_start(module: CausalLM) -> None:
        found.update(lr=module.lr, batch_size=module.trainer.datamodule.batch_size)  # type: ignore[attr-defined]

    monkeypatch.setattr(CausalLM, "on_train_start", on_train_start, raising=False)
    recipe = with_callback(tmp_path, {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": settings})
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", recipe, *tiny])
    before = {"lr": 1e-3, "batch_size": 4}
    assert found[changed] != before[changed]
    state = torch.load(tmp_path / "runs/chat_sft/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 2


@pytest.mark.slow
def test_a_run_that_is_killed_within_a_long_epoch_goes_on(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power failure: what was saved last was saved by the clock."""
    recipe = (RECIPES / "chat_sft.yaml").read_text()
    assert recipe.count('train_time_interval: "0:10:00"') == 1
    (tmp_path / "often.yaml").write_text(recipe.replace("0:10:00", "0:00:01"))
    rows = [json.dumps({"prompt": f"w{1 + i % 9} w{1 + i // 9 % 9}", "response": f"w{1 + i % 7}"}) for i in range(9999)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    long = [*tiny, "--data.path", "rows.jsonl", "--data.batch_size", "1", "--trainer.limit_val_batches", "0"]
    long += ["--data.packing", "false"]
    command = [sys.executable, "-m", "lightning_lora", "fit", "--config", "often.yaml", *long]
    last = tmp_path / "runs/chat_sft/checkpoints/last.ckpt"
    with subprocess.Popen([*command, "--trainer.max_steps", "-1"], cwd=tmp_path) as process:
        try:
            end = time.monotonic() + 200
            while not last.exists() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            process.kill()
    assert last.exists()
    saved = torch.load(last, weights_only=True)
    steps = saved["global_step"]
    assert 0 < steps < 5000 and saved["epoch"] == 0
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "often.yaml", *long, "--trainer.max_steps", str(steps + 2), "--ckpt_path", "last"])
    assert torch.load(last, weights_only=True)["global_step"] == steps + 2
