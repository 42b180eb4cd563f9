"""Adapters as GGUF files: what is in them, and what llama.cpp makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import toys
from helpers.llama_cpp import log_probabilities, server, shorter
from helpers.models import tiny_gpt2, tiny_llama
from helpers.peft_cases import SIZES, biased, llama
from torch import Tensor, nn

from lightning_lora import LoraConfig, inject, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.formats.gguf_adapter import save_gguf_adapter
from lightning_lora.pretrained import load_causal_lm

gguf = pytest.importorskip("gguf")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def qwen2() -> nn.Module:
    torch.manual_seed(0)
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)).eval()


def adapted(model: Any, targets: list[str], **values: Any) -> Any:
    inject(model, LoraConfig(**{"r": 4, "target_modules": targets, "modules_to_save": None, **values}))
    toys.randomize(model)
    return model


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in file.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}


@pytest.mark.parametrize(("make", "architecture", "turned"), [(tiny_llama, "llama", True), (qwen2, "qwen2", False)])
def test_each_update_is_the_layer_s(make: Callable[[], Any], architecture: str, turned: bool, tmp_path: Path) -> None:
    model = adapted(make(), EVERY, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 5}, use_rslora=True)
    fields, tensors = read(save_gguf_adapter(model, tmp_path / "adapter.gguf"))
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == architecture and fields["adapter.lora.alpha"] == 4
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
    assert len(tensors) == 2 * len(EVERY) * len(model.model.layers)
    for block, layer in enumerate(model.model.layers):
        for name, own in names.items():
            adapter = getattr(layer.self_attn if "attn" in own else layer.mlp, name).adapter("default")
            lora_A, lora_B = (tensors[f"blk.{block}.{own}.weight.lora_{matrix}"] for matrix in "ab")
            wanted = adapter.delta_weight().detach()
            if turned and name in ("q_proj", "k_proj"):  # row 2i of a head is row i, and 2i + 1 that of its other half
                half, order = 4, [head * 8 + i for head in range(len(wanted) // 8) for i in (0, 4, 1, 5, 2, 6, 3, 7)]
                assert len(order) == len(wanted) and 2 * half == model.config.hidden_size // 4
                wanted = wanted[order]
            torch.testing.assert_close(lora_B @ lora_A, wanted, rtol=1e-5, atol=1e-6)  # alpha / rank is one


@pytest.mark.parametrize(
    ("model", "targets", "values", "said"),
    [
        (tiny_gpt2, ["c_attn"], {}, "class GPT2LMHeadModel cannot be written as GGUF: known are llama"),
        (llama, ["embed_tokens", "q_proj"], {}, "no place for an adapter of 'model.embed_tokens'"),
        (lambda: llama(tie_word_embeddings=True), ["lm_head"], {}, "'lm_head', which is tied to the embedding"),
        (llama, ["q_proj"], {"use_dora": True}, "cannot hold the magnitudes of DoRA"),
        (biased, ["q_proj"], {"bias": "lora_only"}, "cannot hold trained biases"),
    ],
)
def test_what_llama_cpp_cannot_have_is_said(
    model: Callable[[], Any], targets: list[str], values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        save_gguf_adapter(adapted(model(), targets, **values), tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_one(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(adapted(tiny_llama(), ["q_proj"]), tmp_path / "adapter")
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "out.gguf"), "--base", str(tmp_path / "base")]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--format", "gguf"])
    assert len(read(tmp_path / "out.gguf")[1]) == 6
    assert (tmp_path / "out.Modelfile").read_text() == f"FROM {tmp_path / 'base'}\nADAPTER ./out.gguf\n"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_llama_cpp_computes_what_was_trained(architecture: str, tmp_path: Path) -> None:
    base_file = tmp_path / "base.gguf"
    shorter(base_file, architecture)
    ids = [1, 504, 5575, 282, 4649, 314, 253]

    def trained() -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    def served(*adapters: Path) -> dict[int, float]:
        return log_probabilities(server(base_file, *adapters), ids)

    model = load_causal_lm(str(tmp_path), "base.gguf", torch.float32).eval()
    base = trained()
    rounding = max(abs(value - float(base[token])) for token, value in served().items())
    adapted(model, EVERY, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 5})
    found, wanted = served(save_gguf_adapter(model, tmp_path / "adapter.gguf")), trained()
    difference = max(abs(value - float(wanted[token])) for token, value in found.items())
    moved = max(abs(float(wanted[token] - base[token])) for token in found)
    assert max(found, key=lambda token: found[token]) == int(wanted.argmax())
    assert difference < 0.02 * moved + 3 * rounding, (difference, moved, rounding)
