from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.texts import word_tokenizer
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel

from lightning_lora.tasks import SequenceClassification, TokenClassification


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(12).view(3, 4)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1])}


def test_classes_are_weighed_in_training_alone(pretrained: str) -> None:
    module = SequenceClassification(pretrained, ["a", "b"], class_weights="balanced")
    module.configure_model()
    module.eval()
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(class_counts=[1, 3]))  # type: ignore[assignment]
    module.on_fit_start()
    logged: dict[str, torch.Tensor] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore
    module.log_dict = lambda *_, **__: None  # type: ignore
    inputs = batch()
    labels = inputs["labels"]
    logits = module(**{name: value for name, value in inputs.items() if name != "labels"})
    weight = torch.tensor([2.0, 2 / 3])
    torch.testing.assert_close(module.training_step(inputs, 0), cross_entropy(logits, labels, weight))
    module.validation_step(inputs, 0)
    torch.testing.assert_close(logged["val_loss"], cross_entropy(logits, labels))
    module._trainer.datamodule.class_counts = [0, 3]  # type: ignore
    with pytest.raises(ValueError, match=r"class_counts=\[0, 3\]"):
        module.on_fit_start()


def test_ignored_tokens_count_for_nothing(pretrained: str) -> None:
    module = TokenClassification(pretrained, ["a", "b", "c"])
    module.configure_model()
    module.eval()
    inputs = batch() | {"labels": torch.tensor([[0, -100, 1, 2], [-100] * 4, [2, 2, -100, -100]])}
    loss, logits, labels = module._evaluate(inputs, None)
    assert logits.shape == (5, 3) and labels.tolist() == [0, 1, 2, 2, 2]
    every = module.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(loss, cross_entropy(every.flatten(0, 1), inputs["labels"].flatten()))
    assert [len(row["tags"]) for row in module.predict_step(inputs, 0)] == [3, 0, 2]


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        (["a"], None, "expected two names or more"),
        (["a", "a"], None, "each once"),
        (["a", "b"], [1.0], "Found 1 class"),
    ],
)
def test_bad_settings(labels: list[str], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassification("model", labels, weights)
