"""Embeddings of texts, learned from pairs that belong together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.texts import word_checkpoint, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from transformers import AutoModel, BertConfig, BertModel

from lightning_lora import LoRA
from lightning_lora.data import SentencePairData
from lightning_lora.tasks import SentenceEmbedding
from lightning_lora.tasks.pair_retrieval import PairRetrieval

ROWS: list[dict[str, Any]] = [
    {"anchor": "w1", "positive": "w2 w3", "negative": "w4"},
    {"anchor": "w5 w6 w7", "positive": "w8"},
    {"anchor": "w1", "positive": "w9"},  # another positive of the first anchor
    {"anchor": "w10", "positive": "w8"},  # another anchor of the second positive
    {"anchor": "w11", "positive": "w12", "negative": "w2 w3"},  # what belongs to the first
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return toys.trainer(folder, list(callbacks), enable_checkpointing=False, **options)


def test_loss_is_info_nce(tmp_path: Path, checkpoint: str) -> None:
    """In float64, of texts that go through the model one by one."""
    module = SentenceEmbedding(checkpoint, temperature=0.1)
    module.configure_model()
    module = module.double().eval()
    data = SentencePairData(write(tmp_path, ROWS), checkpoint, val_fraction=0)
    data.setup("fit")
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    found = float(module.training_step(data.collate(data.train_rows[:]), 0))  # type: ignore[index]

    def embedding(text: str) -> torch.Tensor:
        ids = data.tokenizer(text)["input_ids"]
        return normalize(module.model(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=0)

    candidates = [row["positive"] for row in ROWS] + [row["negative"] for row in ROWS if "negative" in row]
    left_out = {0: {2, 6}, 1: {3}, 2: {0, 6}, 3: {1}, 4: set()}
    losses = []
    for i, row in enumerate(ROWS):
        scores = [
            float(embedding(row["anchor"]) @ embedding(text)) / 0.1
            for j, text in enumerate(candidates)
            if j not in left_out[i]
        ]
        own = float(embedding(row["anchor"]) @ embedding(row["positive"])) / 0.1
        losses.append(math.log(sum(map(math.exp, scores))) - own)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-9)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_no_embedding(pooling: Any, tmp_path: Path, checkpoint: str) -> None:
    module = SentenceEmbedding(checkpoint, pooling=pooling)
    module.configure_model()
    module.eval()
    short, long = torch.tensor([7, 8, 9]), torch.arange(7, 14)
    states = module.model(short[None]).last_hidden_state[0]
    expected = normalize({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling], dim=0)
    for side in ("left", "right"):
        left = 4 if side == "left" else 0
        ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
        ids[0, left : left + 3], mask[0, left : left + 3] = short, 1
        ids[1], mask[1] = long, 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        module.model.register_forward_pre_hook(
            lambda _, args, given, positions=positions: (args, {**given, "position_ids": positions}), with_kwargs=True
        )
        torch.testing.assert_close(module(ids, mask)[0], expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20), st.integers(0, 10**6), st.data()
)
def test_retrieval_finds_what_belongs(pairs: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    """Against a search by hand, whatever texts are there twice and however the batches fall."""
    random = torch.Generator().manual_seed(seed)
    # Equal texts have equal embeddings; others no equal similarities.
    of_anchors, of_positives = normalize(torch.randn(2, 6, 8, generator=random), dim=-1)
    keys = torch.tensor(pairs)
    anchors, positives = of_anchors[keys[:, 0]], of_positives[keys[:, 1]]
    metric = PairRetrieval()
    cut = data.draw(st.integers(0, len(pairs)))
    for part in (slice(0, cut), slice(cut, None)):
        if len(keys[part]):
            metric.update(anchors[part], positives[part], keys[part] + torch.tensor([0, 100]))
    ranks = []
    for i, (anchor, _) in enumerate(pairs):
        texts = sorted({each for _, each in pairs}, key=lambda text: -float(anchors[i] @ of_positives[text]))
        ranks.append(next(rank for rank, text in enumerate(texts, 1) if (anchor, text) in pairs))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    for most in (1, 10):
        assert found[f"hit_rate_{most}"] == pytest.approx(sum(rank <= most for rank in ranks) / len(ranks))


def test_retrieval_of_more_than_a_chunk() -> None:
    metric = PairRetrieval()
    eye = torch.eye(600)
    metric.update(eye, eye.roll(1, 0), torch.arange(1200).view(600, 2))
    assert metric.compute()["hit_rate_1"] == 0
    metric.reset()
    metric.update(eye, eye, torch.arange(1200).view(600, 2))
    assert metric.compute()["mrr"] == 1


def test_pairs_come_near_and_embeddings_are_written(tmp_path: Path, checkpoint: str) -> None:
    rows = [{"anchor": f"w{i}", "positive": f"w{i + 20}"} for i in range(20)]
    path = write(tmp_path, rows)
    data = SentencePairData(path, checkpoint, val_path=path, batch_size=10)
    module = SentenceEmbedding(checkpoint, lr=5e-3)
    run = trainer(
        tmp_path, LoRA(r=16, target_modules="all-linear", summary=False), max_epochs=100, check_val_every_n_epoch=100
    )
    with pytest.warns(UserWarning, match="20 of the 20 rows to validate on are learned too"):
        run.fit(module, data)
    assert run.callback_metrics["val_mrr"] > 0.8 and run.callback_metrics["val_hit_rate_10"] == 1
    before = SentenceEmbedding(checkpoint)
    (first,) = trainer(tmp_path).validate(before, data.val_dataloader(), verbose=False)
    assert first["val_mrr"] < 0.6
    assert len(run.validate(module, data.val_dataloader(), verbose=False)) == 1
    asked = write(tmp_path, [{"text": "w3 w4"}, {"anchor": "w3"}], "asked.jsonl")
    batches = run.predict(module, SentencePairData(path, checkpoint, predict_path=asked))
    (one, other) = (row for batch in batches or [] for row in batch)
    assert (one["text"], other["text"]) == ("w3 w4", "w3")
    assert sum(value**2 for value in one["embedding"]) == pytest.approx(1, rel=1e-5)
    module.eval()
    ids = torch.tensor([data.tokenizer("w3 w4")["input_ids"]])
    torch.testing.assert_close(torch.tensor(one["embedding"]), module(ids, torch.ones_like(ids))[0])


def test_decoders_learn_too(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    path = write(tmp_path, [{"anchor": f"w{i}", "positive": f"w{i} w1"} for i in range(20)])
    run = trainer(tmp_path, LoRA(r=4, summary=False), max_epochs=1)
    run.fit(SentenceEmbedding(checkpoint, pooling="last"), SentencePairData(path, checkpoint, batch_size=6))
    assert run.callback_metrics["val_mrr"] > 0


def test_the_merged_model_is_the_trained_one(tmp_path: Path, checkpoint: str) -> None:
    path = write(tmp_path, [{"anchor": f"w{i}", "positive": f"w{i + 20}"} for i in range(20)])
    module = SentenceEmbedding(checkpoint, lr=1e-2)
    run = trainer(tmp_path, LoRA(r=4, summary=False, export_dir=tmp_path / "export"), max_epochs=1)
    run.fit(module, SentencePairData(path, checkpoint, batch_size=10))
    merged = AutoModel.from_pretrained(tmp_path / "export" / "merged").eval()
    ids = torch.tensor([[7, 8, 9]])
    module.eval()
    states = merged(ids).last_hidden_state
    torch.testing.assert_close(module(ids, torch.ones_like(ids)), normalize(states.mean(1), dim=-1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "w1"}, "line 1, field 'positive': found none"),
        ({"anchor": " ", "positive": "w2"}, "line 1, field 'anchor': found ' '"),
        (
            {"anchor": "w1", "positive": "w2", "negative": "w2"},
            "line 1, field 'negative': found the same, expected ano",
        ),
        ({"anchor": "w1", "positive": "w2", "negative": 3}, "line 1, field 'negative': found 3"),
        ({"anchor": "w1", "positive": "w2", "score": 0.3}, "line 1, field 'score': found 0.3"),
        ({"anchor": "w1", "positive": "w2", "negatives": ["w3"]}, "line 1, field 'negatives': found"),
    ],
)
def test_bad_rows(tmp_path: Path, checkpoint: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentencePairData(write(tmp_path, [row]), checkpoint, val_fraction=0).setup("fit")


def test_settings_that_cannot_be(tmp_path: Path, checkpoint: str) -> None:
    with pytest.raises(ValueError, match="Found pooling='max', expected 'mean', 'cls' or 'last'"):
        SentenceEmbedding(checkpoint, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Found temperature=0, expected a positive number"):
        SentenceEmbedding(checkpoint, temperature=0)
    data = SentencePairData(write(tmp_path, ROWS), checkpoint, batch_size=1, val_fraction=0)
    with pytest.raises(ValueError, match=r"Found batch_size=1, expected several pairs.*Raise data\.batch_size"):
        trainer(tmp_path, LoRA(r=2, summary=False)).fit(SentenceEmbedding(checkpoint), data)
