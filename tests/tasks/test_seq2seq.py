"""What was learned by heart is what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_templates import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_lora.data import Seq2SeqData
from lightning_lora.tasks import Seq2Seq

SIZES: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BOS, EOS, PAD = 0, 1, 2


class Languages(PreTrainedTokenizerFast):
    """A tokenizer of two languages, whose token is in front of a text (as mBART-50's) or behind it (as mBART's)."""

    behind = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.src_lang: str | None = None
        self.tgt_lang: str | None = None

    def _language(self, name: str | None) -> None:
        single = f"$A <eos> {name}" if self.behind else f"{name} $A <eos>"
        tokens = [("<eos>", EOS), (str(name), self.convert_tokens_to_ids(str(name)))]
        self.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)

    def _switch_to_input_mode(self) -> None:
        self._language(self.src_lang)

    def _switch_to_target_mode(self) -> None:
        self._language(self.tgt_lang)


class BehindLanguages(Languages):
    behind = True


def tokenizer_of(kind: str) -> Any:
    special = ("en_XX", "de_DE") if kind.startswith("mbart") else ()
    plain = byte_tokenizer(special=special)
    backend = plain.backend_tokenizer
    single = "<bos> $A <eos>" if kind.startswith("bart") else "$A <eos>"
    tokens = [("<bos>", BOS), ("<eos>", EOS)]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    cls = {"mbart": BehindLanguages, "mbart50": Languages}.get(kind, PreTrainedTokenizerFast)
    return cls(tokenizer_object=backend, **names)


def model_of(kind: str, vocab_size: int) -> Any:
    torch.manual_seed(0)
    ids = {"vocab_size": vocab_size, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(**ids, **sizes, decoder_start_token_id=PAD))
    if kind == "marian":
        return MarianMTModel(
            MarianConfig(**ids, **SIZES, dropout=0.0, decoder_start_token_id=PAD, forced_eos_token_id=EOS)
        )
    if kind.startswith("mbart"):
        return MBartForConditionalGeneration(MBartConfig(**ids, **SIZES, dropout=0.0, decoder_start_token_id=EOS))
    model = BartForConditionalGeneration(BartConfig(**ids, **SIZES, dropout=0.0, decoder_start_token_id=EOS))
    model.generation_config.forced_bos_token_id = BOS if kind == "bart-large" else None
    return model


@pytest.mark.parametrize("kind", ["bart", "bart-large", "t5", "mbart", "mbart50", "marian"])
def test_what_was_learned_by_heart_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    model_of(kind, len(tokenizer)).save_pretrained(tmp_path / "model")
    for module in ("lightning_lora.data.texts", "lightning_lora.tasks.seq2seq"):
        # The classes of this file are not those that AutoTokenizer knows.
        monkeypatch.setattr(f"{module}.load_tokenizer", lambda *_: tokenizer_of(kind))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"source": "good", "target": "hello world"}))
    languages = {"source_lang": "en_XX", "target_lang": "de_DE"} if kind.startswith("mbart") else {}
    data = Seq2SeqData(str(tmp_path / "rows.jsonl"), str(tmp_path / "model"), val_fraction=0, **languages)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    task = Seq2Seq(str(tmp_path / "model"), max_new_tokens=20, **languages)
    task.configure_model()
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = task.model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert task.write(batch) == ["hello world"]


def test_languages_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lora.data.texts.load_tokenizer", lambda *_: tokenizer_of("mbart"))
    with pytest.raises(ValueError, match=r"Found source_lang='en_XX' and target_lang=None with a tokenizer of several"):
        Seq2SeqData("absent", "absent", source_lang="en_XX").prepare()
