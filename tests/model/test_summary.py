"""The table that says what is trained."""

from pathlib import Path

import pytest
from helpers import toys
from helpers.models import tiny_classifier

from lightning_lora import LoRA, LoraConfig, inject
from lightning_lora.model.summary import print_summary


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
