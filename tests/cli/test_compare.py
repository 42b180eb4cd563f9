"""Two adapters of one base beside each other, as a user asks for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from helpers.quantized import dequantize, kinds, quantize, train

from lightning_lora import LoraConfig, inject, save_adapter
from lightning_lora.cli.compare import amplification, draw
from lightning_lora.cli.main import main


def adapter(path: Path, r: int, seed: int, **settings: Any) -> torch.nn.Module:
    model = inject(tiny_llama(), LoraConfig(r=r, target_modules=["q_proj", "v_proj"], **settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    save_adapter(model, path)
    return model


def call(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    return int(stop.value.code or 0)


def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "one", 2, 0)
    adapter(tmp_path / "other", 4, 1)
    tiny_llama().save_pretrained(tmp_path / "base")
    picture = tmp_path / "subspaces.png"
    given = ["compare", tmp_path / "one", tmp_path / "other", "--output", picture, "--base", tmp_path / "base"]
    assert call(*given) == 0
    shown = capsys.readouterr().out
    assert "phi(r, r)" in shown
    assert "amplified" in shown
    assert shown.count("q_proj") == shown.count("v_proj") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("compare", tmp_path / "one", tmp_path / "one") == 0
    assert "1.00      \u2502 1.00" in capsys.readouterr().out  # in the same space as itself


def test_what_an_update_amplifies(tmp_path: Path) -> None:
    model: Any = adapter(tmp_path / "one", 2, 0, lora_alpha=6)
    found = amplification(model)
    assert len(found) == 6
    layer = model.model.layers[0].self_attn.q_proj
    update = layer.lora["default"].delta_weight().detach().double()
    left, _, right = torch.linalg.svd(update)
    inside = left[:, :2].mT @ layer.weight.detach().double() @ right[:2].mT
    expected = float(update.norm() / inside.norm())
    assert found["model.layers.0.self_attn.q_proj"] == pytest.approx(expected, rel=1e-5)
    # A weight that is the update itself is amplified by one.
    layer.weight.data = update.float()
    assert amplification(model)["model.layers.0.self_attn.q_proj"] == pytest.approx(1, rel=1e-4)


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "one", 2, 0)
    model = inject(tiny_llama(), LoraConfig(target_modules=["o_proj"]))
    save_adapter(model, tmp_path / "other")
    assert call("compare", tmp_path / "one", tmp_path / "other") == 1
    assert "no adapted layer of one shape in common" in capsys.readouterr().err


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        draw({"q": torch.ones(2, 2)}, tmp_path / "subspaces.png", ("one", "other"))


@kinds("nf4", "int8", "torchao int8")
def test_what_an_update_amplifies_in_a_quantized_base(kind: str) -> None:
    found = []
    for values in (False, True):
        model = quantize(tiny_llama(tie_word_embeddings=False), kind)
        model = inject(dequantize(model) if values else model, LoraConfig(r=2))
        train(model)
        found.append(amplification(model))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert len(found[0]) == 21
