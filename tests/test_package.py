import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from test_targets import tiny_classifier

import lightning_lora
from lightning_lora import LoRA, LoraConfig, inject
from lightning_lora.model.summary import print_summary


def test_public_names_are_there() -> None:
    assert all(hasattr(lightning_lora, name) for name in lightning_lora.__all__)


def test_importing_brings_in_nothing_heavy() -> None:
    code = (
        "import sys, lightning; before = set(sys.modules); import lightning_lora; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in "
        "('transformers', 'torchmetrics', 'rich', 'peft', 'jsonargparse')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_takes_a_fifth_of_a_second_at_most() -> None:
    code = (
        "import time, lightning; start = time.perf_counter(); import lightning_lora; print(time.perf_counter() - start)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert statistics.median(times) <= 0.2


def test_summary_says_what_is_trained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = inject(tiny_classifier(), LoraConfig(r=2, target_modules=["query", "value"], rank_pattern={"value": 4}))
    monkeypatch.setenv("COLUMNS", "120")
    print_summary(model)
    out = capsys.readouterr().out
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert trainable == 2 * (2 + 4) * 64 + 99
    assert f"trainable {trainable:,} | frozen {total - trainable:,} | total {total:,}" in out
    assert f"{100 * trainable / total:.3f}% trained | {4 * trainable / 1e6:.2f} MB on disk" in out
    assert "classifier" in out.splitlines()[-1]
    (query,) = [line for line in out.splitlines() if "query" in line]
    assert "bert.encoder.layer.*.attention.self.query" in query
    assert [cell.strip() for cell in query.split("│")[3:6]] == ["2", "2", "256"]


def test_summary_is_printed_once_and_can_be_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [LoRA(target_modules=["0"]), LoRA(target_modules=["4"])]
    toys.trainer(tmp_path, callbacks, max_epochs=1).fit(toys.Toy(), toys.loader())
    assert capsys.readouterr().out.count("trainable ") == 1
    toys.trainer(tmp_path, [LoRA(summary=False)], max_epochs=1).fit(toys.Toy(), toys.loader())
    assert "trainable" not in capsys.readouterr().out


def test_settings_reach_the_config() -> None:
    assert LoRA(r=3, bias="all").config == LoraConfig(r=3, bias="all")
    config = LoraConfig(r=5)
    assert LoRA(config=config).config is config
    with pytest.raises(ValueError, match="both a config and settings"):
        LoRA(r=3, config=config)
    with pytest.raises(ValueError, match="merge is 'first'"):
        LoRA(merge="first")
