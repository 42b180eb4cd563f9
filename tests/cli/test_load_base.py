"""The base of an adapter, by the class that its files name."""

import json
from pathlib import Path

import pytest
import transformers
from helpers.models import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora import CheckpointError
from lightning_lora.cli.load_base import load_base

NO_MODELS = ["pipeline", "AutoTokenizer", "LlamaConfig", "Trainer", "logging", "__name__", "AutoModelForCausalLM"]


def test_a_model_is_opened_as_its_class(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert type(load_base(str(tmp_path), None, "auto", None)) is transformers.LlamaForCausalLM


@given(name=st.sampled_from(NO_MODELS))
def test_what_is_no_class_of_a_model_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))
    with pytest.raises(CheckpointError, match=f"names {name!r} as its class, which is no model of transformers"):
        load_base(str(path), None, "auto", None)


@pytest.mark.parametrize("name", ["DDIMScheduler", "logging", "__name__", None, 3])
def test_so_it_is_with_diffusers(tmp_path: Path, name: object) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({"_diffusers_version": "0.42.0", "_class_name": name}))
    with pytest.raises(CheckpointError, match="which is no model of diffusers"):
        load_base(str(tmp_path), None, "auto", None)
