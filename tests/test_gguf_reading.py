"""GGUF files are parsed once, and what is loaded is what it is without that."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tokenizers import byte_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora import gguf_reading
from lightning_lora.formats.gguf_model import save_gguf
from lightning_lora.pretrained import load_causal_lm, load_tokenizer
from lightning_lora.tasks import CausalLM

gguf = pytest.importorskip("gguf")
ROWS = 320


def model(seed: int = 0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4
        )
    )


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files that were parsed."""
    found: list[str] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: Any, *rest: Any) -> None:
            found.append(Path(path).name)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    yield found
    assert gguf.GGUFReader is Counted


def test_a_model_and_its_tokenizer_are_of_one_parse(tmp_path: Path, parses: list[str]) -> None:
    save_gguf(model(), tmp_path / "model.gguf", byte_pairs("smollm", ROWS))
    parses.clear()
    task = CausalLM(str(tmp_path), gguf_file="model.gguf")
    task.configure_model()
    assert parses == ["model.gguf"] and task.tokenizer.vocab_size == ROWS


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.integers(1, 3))
def test_the_same_is_loaded(tmp_path: Path, seed: int, layers: int) -> None:
    save_gguf(model(seed, layers), tmp_path / "model.gguf", byte_pairs("smollm", ROWS))
    found = []
    for within in (gguf_reading.parsed_once, nullcontext):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_lora.pretrained.parsed_once", within)
            loaded = load_causal_lm(str(tmp_path), "model.gguf", torch.float32)
            found.append((loaded.state_dict(), load_tokenizer(str(tmp_path), "model.gguf").get_vocab()))
    (weights, words), (expected, expected_words) = found
    assert words == expected_words and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_nothing_is_remembered_after_the_outermost_context(tmp_path: Path, parses: list[str]) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(model(), path, byte_pairs("smollm", ROWS))
    parses.clear()
    with gguf_reading.parsed_once(path.name):
        with gguf_reading.parsed_once(path.name):
            gguf.GGUFReader(str(path))
        gguf.GGUFReader(str(path))
    assert parses == ["model.gguf"]
    with pytest.raises(ZeroDivisionError), gguf_reading.parsed_once(path.name):
        raise ZeroDivisionError
    gguf.GGUFReader(str(path))
    assert parses == ["model.gguf"] * 2


def test_other_checkpoints_do_not_need_the_library(parses: list[str]) -> None:
    reader = gguf.GGUFReader
    with gguf_reading.parsed_once(None):
        assert gguf.GGUFReader is reader
