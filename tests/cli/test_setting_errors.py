"""Wrong settings, on the command line and in files: one paragraph each, and never a half-made run."""

import re
import sys
from argparse import ArgumentError
from pathlib import Path

import pytest

from lightning_lora.cli.main import main
from lightning_lora.cli.setting_errors import explained

RECIPE = ["--config", "quickstart"]
WRONG = {
    ("--trainer.max_epochs", "three"): "Found three for trainer.max_epochs, expected int or null.",
    ("--trainer.devicess", "3"): "Did you mean --trainer.devices?",
    ("--model.lr", "fast"): "Found fast for model.lr, expected float",
    (
        "--model.pretraind",
        "x",
    ): "Found the setting pretraind of lightning_lora.tasks.CausalLM (model), expected "
    "one that it takes. Did you mean pretrained?",
    ("--data.pth", "x"): "Did you mean path?",
    ("--model", "lightning_lora.tasks.CausalLMM"): "Did you mean lightning_lora.tasks.CausalLM?",
    ("--model", "nopackage.Foo"): "No module named 'nopackage'",
    ("--data", "collections.OrderedDict"): "expected a LightningDataModule",
    (
        "--trainer.callbacks+=lightning_lora.LoRA",
        "--trainer.callbacks.r=x",
    ): "Found x for trainer.callbacks.r, expected int",
    ("--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.rr=4"): "Did you mean r?",
    ("--lora", "x"): "Found x for lora, expected dict",
    ("--lora.r", "x"): "Found x for lora.r, expected int",
    ("--lora.target_modules", "5"): "Found 5 for lora.target_modules, expected str or list",
    ("--lora.use_dora", "maybe"): "Found maybe for lora.use_dora, expected bool",
    ("--lora.lora_alfa", "4"): "Did you mean --lora.lora_alpha?",
    ("--lora.lora_dropout", "7"): "lora_dropout is 7.0, but it must lie in [0, 1)",
    ("--data.batch_size", "-1"): "Found batch_size=-1, expected at least 1.",
    ("--model.lr",): "Found no value after --model or a setting of it",
    ("stray",): "Found stray, expected settings",
}
FILES = {
    "trainer:\n  max_epoch: 1\n": "Found the setting trainer.max_epoch in my.yaml, line 2, expected one that there is. "
    "Did you mean trainer.max_epochs?",
    "trainerr:\n  max_epochs: 1\n": "Did you mean trainer?",
    "trainer:\n  max_epochs: x\n": "Found x for trainer.max_epochs in my.yaml, line 2, expected int or null.",
    "model:\n  init_args:\n    lr: fast\n": "Found fast for model.lr in my.yaml, line 3, expected float",
    "model:\n  init_args:\n    lrr: 1\n": "(model) in my.yaml, line 3, expected one that it takes. Did you mean lr?",
    "trainer:\n  callbacks:\n  - class_path: lightning_lora.LoRa\n": "in my.yaml, line 3 (module",
    "trainer:\n  max_epochs: 1\n  max_epochs: 2\n": "Found 'max_epochs' twice in my.yaml, the second time in line 3",
    "trainer: [1\nmodel: x\n": "Found no YAML in my.yaml, line 2",
    "- a\n": "Found a list in my.yaml",
    "": "Found nothing in my.yaml",
    "\udc80": "Found no text in my.yaml",
}


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one paragraph that a wrong call ends with."""
    monkeypatch.setattr(sys, "argv", ["lightning-lora", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Seed set", "precision: "))]
    assert len(lines) == 1 and lines[0].startswith(f"lightning-lora {arguments[0]}: ")
    assert "Traceback" not in lines[0] and "usage:" not in lines[0] and "<class" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("command", ["fit", "predict"])
@pytest.mark.parametrize("given", WRONG)
def test_wrong_on_the_command_line(
    command: str, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WRONG[given] in said(monkeypatch, capsys, command, *RECIPE, *given)


@pytest.mark.parametrize("text", FILES)
def test_wrong_in_a_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_bytes(text.encode(errors="surrogateescape"))
    assert FILES[text] in said(monkeypatch, capsys, "fit", *RECIPE, "--config", "my.yaml")
    assert FILES[text] in said(monkeypatch, capsys, "fit", *RECIPE, "--config=my.yaml")


def test_a_value_of_the_command_line_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("trainer:\n  max_steps: 3\n")
    error = said(monkeypatch, capsys, "fit", *RECIPE, "--config", "my.yaml", "--trainer.max_steps", "x")
    assert "Found x for trainer.max_steps, expected" in error


@pytest.mark.parametrize("command", ["fitt", "dat"])
def test_a_command_that_is_not_there(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Did you mean" in said(monkeypatch, capsys, command)


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-lora", "fit", *RECIPE, "--model.lr", "fast", "--debug"])
    with pytest.raises(ArgumentError, match=r"Found fast for model\.lr") as raised:
        main()
    assert isinstance(raised.value.__cause__, ArgumentError)


def test_words_that_are_not_known_are_kept_in_one_line() -> None:
    assert explained("a new\n  way\n to fail", [], lambda *_: "") == "a new way to fail"


@pytest.mark.parametrize(
    "arguments",
    [
        [command, *rest]
        for command in ("inspect", "merge", "diff", "export", "push", "report", "recipes")
        for rest in ([], ["a", "b", "c", "d", "--no-such"], ["--no-such"])
        if command != "recipes" or rest
    ]
    + [["recipes", "copy"], ["recipes", "cop", "x"]],
)
def test_wrong_calls_of_the_other_commands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    wrong = r"the following arguments are required|unrecognized arguments|argument \w+: invalid choice"
    assert stop.value.code == 2
    assert re.match(rf"lightning-lora[ \w]*: ({wrong}).*\. lightning-lora[ \w]* --help says what it takes\.$", line)
