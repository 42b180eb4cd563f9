"""Files as Windows wants them, by a stand-in that raises what Windows would."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers as tf
from helpers.models import IDS, tiny_llama
from helpers.recipe_runs import run
from helpers.toys import Toy, loader, randomize, trainer
from helpers.windows import windows_below
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRA, LoraConfig, inject, load_adapter, merge, save_adapter, save_merged
from lightning_lora.callbacks import LearningCurve
from lightning_lora.cli.main import main
from lightning_lora.formats import publish

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tells what is open by Linux's /proc")


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(publish, "_IS_WINDOWS", True)
    monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    with windows_below(tmp_path):
        yield tmp_path


def test_the_stand_in_forbids_what_windows_does(windows: Path) -> None:
    one, two = windows / "one", windows / "two"
    one.write_text("1"), two.write_text("2")
    with one.open(), pytest.raises(PermissionError, match="in use"):
        os.replace(two, one)
    with two.open(), pytest.raises(PermissionError, match="in use"):
        os.replace(two, one)
    with one.open(), pytest.raises(PermissionError, match="in use"):
        one.unlink()
    for name in ("a:b", "aux.txt", "end.", "what?"):
        with pytest.raises(OSError, match="no such names"):
            (windows / name).write_text("")
    with pytest.raises(OSError, match="symbolic"):
        one.symlink_to(two)
    with pytest.raises(PermissionError, match="no directories"):
        os.open(windows, os.O_RDONLY)
    torch.save(torch.zeros(1 << 16), windows / "three")
    mapped = torch.load(windows / "three", mmap=True)
    with pytest.raises(PermissionError, match="in use"):
        (windows / "three").unlink()
    del mapped
    (windows / "three").unlink()


def test_a_run_saves_resumes_merges_and_exports(windows: Path) -> None:
    for steps, ckpt_path in ((4, None), (8, windows / "last.ckpt")):
        callbacks = [
            LoRA(r=2, merge="best", export_dir=windows / "export", summary=False),
            ModelCheckpoint(windows, "{epoch}-{train_loss:.2f}", monitor="train_loss", save_last=True, save_top_k=2),
            LearningCurve(),
        ]
        trainer(windows, callbacks, max_steps=steps, max_epochs=-1).fit(Toy(), loader(), ckpt_path=ckpt_path)
    assert (windows / "export" / "adapter" / "adapter_model.safetensors").exists()


def test_an_adapter_is_written_over_one_that_is_in_memory(windows: Path) -> None:
    model = inject(tiny_llama(), LoraConfig(r=2))
    kept = []
    for _ in range(3):
        randomize(model)
        save_adapter(model, windows / "adapter")
        kept.append(load_adapter(tiny_llama(), windows / "adapter"))


def test_a_model_that_is_in_use_stays_whole(windows: Path) -> None:
    model = merge(inject(tiny_llama(), LoraConfig(r=2)))
    save_merged(model, windows / "merged")
    opened = tf.AutoModelForCausalLM.from_pretrained(windows / "merged")  # which maps the file
    with pytest.raises(PermissionError, match="in use"):
        save_merged(model, windows / "merged")
    assert [path.name for path in windows.iterdir()] == ["merged"]
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits)
    del opened
    save_merged(model, windows / "merged")


def test_a_recipe_and_the_commands_for_what_it_left(
    windows: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = windows / "place"
    run(place, monkeypatch, "fit", "chat_sft", *tiny)
    run(place, monkeypatch, "fit", "chat_sft", *tiny, "--trainer.max_steps", "4", "--ckpt_path", "last")
    (place / "questions.csv").write_text("prompt\nw1 w2\nw3\n")
    asked = ["--data.predict_path", "questions.csv", "--output", "out/answers.jsonl", "--ckpt_path", "last"]
    for resume in ("false", "true"):
        run(place, monkeypatch, "predict", "chat_sft", *tiny, *asked, "--resume", resume)
    adapter, base = "runs/chat_sft/export/adapter", tiny[tiny.index("--model.pretrained") + 1]
    for command in (
        ["inspect", adapter], ["diff", adapter, "runs/chat_sft/checkpoints/last.ckpt"],
        ["export", "runs/chat_sft/checkpoints/last.ckpt", "exported", "--base", base],
        ["export", adapter, "exported", "--base", base], ["merge", adapter, "merged", "--base", base],
        ["merge", adapter, "merged", "--base", base], ["resize", adapter, "resized", "--rank", "2"],
        ["report", adapter],
    ):  # fmt: skip
        with suppress(SystemExit):  # of a question that is answered
            main(command)
    for target in ("exported/adapter_model.safetensors", "merged/model.safetensors", "resized/adapter_config.json"):
        assert (place / target).exists()
