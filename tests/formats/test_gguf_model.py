"""Merged models as GGUF files: what transformers reads of them, and what llama.cpp makes of them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import torch
import transformers as tf
from helpers import toys
from helpers.llama_cpp import continued, log_probabilities, server, shorter, tokenized
from helpers.peft_cases import SIZES
from helpers.quantized import quantize
from helpers.tokenizers import SPLITS, byte_pairs
from torch import Tensor, nn

from lightning_lora import LoraConfig, eject, inject, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.formats.gguf_model import save_gguf
from lightning_lora.pretrained import load_causal_lm, load_tokenizer

gguf = pytest.importorskip("gguf")
ROWS = 320
IDS = torch.arange(60).view(2, 30)
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),  # which transformers takes for granted of GGUF files
}
FOR_LLAMA_CPP: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "llama, biases": ("Llama", {"attention_bias": True}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}),
    "qwen3, small heads": ("Qwen3", {"head_dim": 16}),
}


def build(family: str, **values: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**SIZES, "vocab_size": ROWS, **values})
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which begin as zeros
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(model: Any, **values: Any) -> Any:
    inject(model, LoraConfig(**{"r": 4, "target_modules": EVERY, "modules_to_save": None, **values}))
    toys.randomize(model)
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def last_log_probabilities(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return logits(model, ids)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_opens_what_was_trained(kind: str, tmp_path: Path) -> None:
    family, values = MODELS[kind]
    model = adapted(build(family, **values))
    wanted = logits(model)
    path = save_gguf(model, tmp_path / "model.gguf", byte_pairs("smollm", ROWS))
    assert torch.equal(logits(model), wanted)  # it is as it was
    opened = load_causal_lm(str(tmp_path), path.name, torch.float32).eval()
    torch.testing.assert_close(logits(opened), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, logits(build(family, **values)), atol=1e-2)
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("dtype", "kind", "close"), [("float16", "F16", 2e-3), ("bfloat16", "BF16", 2e-2), ("q8_0", "Q8_0", 2e-2)]
)
def test_each_type(dtype: Any, kind: str, close: float, tmp_path: Path) -> None:
    model = adapted(build("Llama"))
    save_gguf(model, tmp_path / "model.gguf", byte_pairs("smollm", ROWS), dtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    of_norms = {types.pop(name) for name in list(types) if "norm" in name}
    of_rows_of_48 = {types.pop(name) for name in list(types) if "ffn_down" in name}  # which 32 does not divide
    assert of_norms == {"F32"} and of_rows_of_48 == {"F16" if kind == "Q8_0" else kind}
    assert {"token_embd.weight", "output.weight", "blk.0.attn_q.weight"} <= types.keys()
    assert set(types.values()) == {kind}
    found = logits(load_causal_lm(str(tmp_path), "model.gguf", torch.float32).eval())
    torch.testing.assert_close(found, logits(model), rtol=close, atol=close)
    assert not torch.equal(found, logits(model))


def test_a_bfloat16_base_gives_a_bfloat16_file(tmp_path: Path) -> None:
    save_gguf(build("Llama").bfloat16(), tmp_path / "model.gguf", byte_pairs("smollm", ROWS))
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    opened = load_causal_lm(str(tmp_path), "model.gguf", torch.bfloat16)
    toys.assert_same_tensors(dict(opened.named_parameters()), dict(build("Llama").bfloat16().named_parameters()))


def test_settings_and_tokens_are_in_the_file(tmp_path: Path) -> None:
    tokenizer = byte_pairs("qwen2", 300, chat_template="{{ messages }}", pad_token="<|end|>")
    save_gguf(build("Qwen2"), tmp_path / "model.gguf", tokenizer)
    found = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == ROWS > len(tokenizer)
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == f"[PAD{ROWS - 1}]" and kinds[-1] == gguf.TokenType.UNUSED
    assert kinds[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    wanted = {"pre": "qwen2", "eos_token_id": 0, "bos_token_id": 1, "padding_token_id": 0, "add_bos_token": False}
    assert {name: found[f"tokenizer.ggml.{name}"] for name in wanted} == wanted
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    sizes = {"context_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8}
    assert {name: found[f"qwen2.{name}"] for name in sizes} == sizes


def with_byte_fallback() -> Any:
    return tf.PreTrainedTokenizerFast(tokenizer_object=tk.Tokenizer(tk.models.BPE(byte_fallback=True)))


def with_whole_words() -> Any:
    return tf.PreTrainedTokenizerFast(tokenizer_object=tk.Tokenizer(tk.models.WordLevel({"a": 0}, "a")))


def changed(**parts: Any) -> Any:
    tokenizer = byte_pairs("gpt-2", ROWS)
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    ("family", "values", "tokenizer", "said"),
    [
        ("Qwen2", {"rope_parameters": LLAMA3}, None, "architecture qwen2: rope_type='llama3'"),
        ("Llama", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, None, "rope_type='yarn'"),
        ("Llama", {"hidden_act": "gelu"}, None, "hidden_act='gelu'"),
        ("Mistral", {"sliding_window": 32}, None, "sliding_window=32"),
        ("GPTNeoX", {}, None, "class GPTNeoXForCausalLM cannot be written as GGUF: known are llama, mistral"),
        ("Llama", {"vocab_size": 32}, lambda: byte_pairs("gpt-2"), "has a token 3.*, and the embedding 32 rows"),
        ("Llama", {}, with_byte_fallback, "BPE with byte_fallback, and only those"),
        ("Llama", {}, with_whole_words, "is WordLevel, and only those"),
        ("Llama", {}, lambda: changed(normalizer=tk.normalizers.Lowercase()), "changes texts first .Lowercase."),
        ("Llama", {}, lambda: changed(pre_tokenizer=tk.pre_tokenizers.Whitespace()), 'another way .*"Whitespace"'),
        ("Llama", {}, lambda: changed(pre_tokenizer=tk.pre_tokenizers.ByteLevel(True)), "another way than"),
        ("Llama", {}, object, "has no tokenizer.json"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_do_otherwise_is_refused(
    family: str, values: dict[str, Any], tokenizer: Callable[[], Any] | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        save_gguf(build(family, **values), tmp_path / "model.gguf", (tokenizer or (lambda: byte_pairs("gpt-2")))())
    assert not list(tmp_path.iterdir())


def test_a_classifier_has_no_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no head for tokens"):
        save_gguf(model, tmp_path / "model.gguf", byte_pairs("gpt-2"))


def test_what_is_not_finite_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    model, path = build("Llama"), tmp_path / "model.gguf"
    path.write_text("mine")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6  # more than float16 has
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight' holds values that are not finite in float16"):
        save_gguf(model, path, byte_pairs("gpt-2"), "float16")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["mine"]
    save_gguf(model, path, byte_pairs("gpt-2"), "bfloat16")


def test_a_quantized_base_is_made_ordinary(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(quantize(build("Llama", hidden_size=64, head_dim=16), "nf4"))
    wanted = logits(eject(copy.deepcopy(model), merge=True, dtype=torch.float32))
    save_gguf(model, tmp_path / "model.gguf", byte_pairs("gpt-2"))
    opened = load_causal_lm(str(tmp_path), "model.gguf", torch.float32).eval()
    torch.testing.assert_close(logits(opened), wanted, rtol=1e-4, atol=1e-5)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_the_command_line_takes_the_tokenizer_of_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("Llama").save_pretrained(tmp_path / "base")
    save_adapter(model := adapted(build("Llama")), tmp_path / "adapter")
    merge = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out.gguf"), "--base", str(tmp_path / "base")]
    assert call(*merge, "--format", "gguf") == 1
    assert "A GGUF file holds a tokenizer too, and there is none with" in capsys.readouterr().err
    assert call(*merge, "--dtype", "q8_0") == 2
    byte_pairs("smollm", ROWS).save_pretrained(tmp_path / "base")
    assert call(*merge, "--format", "gguf") == 0
    assert (tmp_path / "out.Modelfile").read_text() == "FROM ./out.gguf\n"
    opened = load_causal_lm(str(tmp_path), "out.gguf", torch.float32).eval()
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOR_LLAMA_CPP)
def test_llama_cpp_computes_what_was_trained(kind: str, tmp_path: Path) -> None:
    family, values = FOR_LLAMA_CPP[kind]
    model = adapted(build(family, **values))
    wanted, base = (last_log_probabilities(each) for each in (model, build(family, **values)))
    path = save_gguf(model, tmp_path / "model.gguf", byte_pairs("smollm", ROWS))
    found = log_probabilities(server(path), IDS[0].tolist())
    assert len(found) == 20
    apart = max(abs(value - float(wanted[token])) for token, value in found.items())
    moved = max(abs(float(base[token] - wanted[token])) for token in found)
    assert apart < 0.01 * moved, (apart, moved)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_makes_the_same_tokens(split: str, tmp_path: Path) -> None:
    tokenizer = byte_pairs(split, ROWS, additional_special_tokens=["<|user|>"])
    tokenizer.add_tokens(["wörld"])
    path = save_gguf(build("Llama", vocab_size=ROWS + 8), tmp_path / "model.gguf", tokenizer)
    running = server(path)
    texts = [
        "The quick fox 12345678 jumps",
        "don't WE'LL I'm  two   spaces\n\n\nlines\r\n",
        "x_y=z(1,2); héllo wörld 日本語 🙂",
        "<|user|>hi<|end|>\t tab",
        "٣٤٥ ½ ²",
        "ends in spaces   ",
    ]
    assert [tokenized(running, text) for text in texts] == [tokenizer(text).input_ids for text in texts]


@pytest.mark.slow
def test_a_base_that_is_a_gguf_file_gives_its_tokenizer(tmp_path: Path) -> None:
    shorter(tmp_path / "base.gguf", "llama")
    model = load_causal_lm(str(tmp_path), "base.gguf", torch.float32).eval()
    untrained = copy.deepcopy(model)
    adapted(model)
    save_adapter(model, tmp_path / "adapter")
    merge = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out.gguf"), "--base", str(tmp_path)]
    assert call(*merge, "--gguf-file", "base.gguf", "--format", "gguf") == 0
    base, made = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("base", "out"))
    kept = [name for name in base if name.startswith("tokenizer.")]
    assert len(kept) > 9 and all(made[name].contents() == base[name].contents() for name in kept)
    text = "The capital of France is"
    running = server(tmp_path / "out.gguf")
    ids = torch.tensor([tokenized(running, text)])
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    tokenizer = load_tokenizer(str(tmp_path), "base.gguf")
    assert continued(running, text, 8) == tokenizer.decode(generated)
    assert continued(server(tmp_path / "base.gguf"), text, 8) != tokenizer.decode(generated)

    assert call(*merge, "--gguf-file", "base.gguf", "--format", "gguf", "--dtype", "q8_0") == 0
    assert (tmp_path / "out.gguf").stat().st_size < 0.3 * (tmp_path / "base.gguf").stat().st_size
    wanted, before = (last_log_probabilities(each, ids) for each in (model, untrained))
    found = log_probabilities(server(tmp_path / "out.gguf"), ids[0].tolist())
    apart = max(abs(value - float(wanted[token])) for token, value in found.items())
    moved = max(abs(float(before[token] - wanted[token])) for token in found)
    assert apart < 0.05 * moved, (apart, moved)
    assert max(found, key=lambda token: found[token]) == int(wanted.argmax())
