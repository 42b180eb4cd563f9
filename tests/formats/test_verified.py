import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import EXPERTS, mixtral, tiny_gpt2, tiny_llama
from helpers.toys import randomize, toy_net
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from lightning_lora import CheckpointError, LoraConfig, eject, inject, save_adapter
from lightning_lora.formats import merged, peft
from lightning_lora.formats.merged import save_merged


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    inject(model, LoraConfig(r=2, **settings))
    randomize(model)
    return model


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path, {"format": "pt"})


def test_an_adapter_that_was_written_wrong_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 3})
    save_adapter(model, tmp_path / "right")
    write = peft.write_weights

    def one_bit(path: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        name = next(iter(tensors))
        write(path, {**tensors, name: tensors[name].nextafter(torch.tensor(torch.inf))}, *rest)

    monkeypatch.setattr(peft, "write_weights", one_bit)
    with pytest.raises(CheckpointError, match="is not the one in memory: '.*lora_A.weight' differs"):
        save_adapter(model, tmp_path / "wrong")
    monkeypatch.undo()
    settings = peft.peft_config

    def without_pattern(*found: Any) -> dict[str, Any]:
        return {**settings(*found), "alpha_pattern": {}}

    monkeypatch.setattr(peft, "peft_config", without_pattern)
    with pytest.raises(CheckpointError, match=r"mean another adapter: it scales the update of model\.layers\.0"):
        save_adapter(model, tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def one_value(tensors: dict[str, Any]) -> None:
    first = next(iter(tensors))
    tensors[first] = tensors[first].nextafter(torch.tensor(torch.inf))


def one_less(tensors: dict[str, Any]) -> None:
    del tensors[next(iter(tensors))]


def one_narrower(tensors: dict[str, Any]) -> None:
    first = next(iter(tensors))
    tensors[first] = tensors[first].bfloat16()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", one_value, "is not the one in memory: '.*' differs or is missing"),
        ("model.safetensors", one_less, "is not the one in memory: '.*' differs or is missing"),
        ("model.safetensors", one_narrower, "is not the one in memory: '.*' differs or is missing"),
        ("config.json", lambda config: config.update(vocab_size=65), r"'.*' is .*\[65, 32\].* there and .*\[64, 32\]"),
        ("config.json", lambda config: config.update(num_hidden_layers=2), "'model.layers.2.* is missing there"),
    ],
)
def test_a_merged_model_that_was_written_wrong_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: Any, message: str
) -> None:
    model = eject(adapted(tiny_llama(), target_modules=["q_proj"]), merge=True)
    write = merged._write

    def wrong(model: nn.Module, directory: Path, *rest: Any) -> Path:
        write(model, directory, *rest)
        edit(directory / file, change)
        return directory

    monkeypatch.setattr(merged, "_write", wrong)
    with pytest.raises(CheckpointError, match=message):
        save_merged(model, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())
    save_merged(model, tmp_path / "unverified", verify=False)


class Wider(LlamaForCausalLM):
    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config)
        self.wide = nn.Linear(config.hidden_size, width)


def with_more() -> Any:
    model = tiny_llama()
    model.more = nn.Linear(3, 3)
    return model


def resized_behind_the_config() -> Any:
    model = tiny_llama()
    model.resize_token_embeddings(80)
    model.config.vocab_size = 64
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Wider(tiny_llama().config, 5), "takes beside its config: .*'width'"),
        (with_more, "'more.bias' is missing there"),
        (resized_behind_the_config, r"'lm_head.weight' is .*64, 32.* there and .*80, 32.* here"),
    ],
)
def test_a_model_that_its_own_config_does_not_build_is_written_and_said(
    tmp_path: Path, build: Any, message: str
) -> None:
    model = eject(inject(build(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[])), merge=True)
    with pytest.warns(UserWarning, match=message):
        save_merged(model, tmp_path / "whole")
    written = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.items())
    assert written


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (lambda: tiny_llama(tie_word_embeddings=True), {"target_modules": ["q_proj"]}),
        (lambda: tiny_llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
        (tiny_gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
        (mixtral, {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
        (toy_net, {"target_modules": ["0", "4"]}),
        (lambda: tiny_llama().bfloat16(), {"target_modules": ["q_proj"]}),
    ],
    ids=["tied", "untied", "gpt2", "experts", "plain", "bfloat16"],
)
def test_what_is_right_passes(tmp_path: Path, build: Any, settings: dict[str, Any]) -> None:
    model = eject(adapted(build(), **settings), merge=True)
    save_merged(model, tmp_path / "whole")
    save_merged(model, tmp_path / "cut", max_shard_size="20KB")
    assert list((tmp_path / "whole").glob("*.safetensors"))
