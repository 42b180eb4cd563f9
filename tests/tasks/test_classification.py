from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.texts import word_tokenizer
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import BertConfig, BertModel

from lightning_lora.data import LabelledTextData
from lightning_lora.data.labels import ProblemType
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


def logged(module: SequenceClassification, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a validation of one batch logs."""
    module.configure_model()
    module.eval()
    found: dict[str, float] = {}
    module.log = lambda name, value, **_: found.__setitem__(name, float(value))  # type: ignore
    module.log_dict = lambda metrics, **_: found.update({k: float(v) for k, v in metrics.compute().items()})  # type: ignore
    module.validation_step(inputs, 0)
    return found


SEVERAL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


def test_several_labels_a_row(pretrained: str) -> None:
    """The formulas in float64, and the settings of the model that is saved."""
    module = SequenceClassification(pretrained, ["a", "b", "c"], problem_type="multi_label_classification")
    inputs = batch() | {"labels": SEVERAL}
    found = logged(module, inputs)
    logits = module(**{name: value for name, value in inputs.items() if name != "labels"}).detach().double()
    p = 1 / (1 + (-logits).exp())
    hits, true = p > 0.5, SEVERAL > 0.5
    assert found["val_loss"] == pytest.approx(float(-torch.where(true, p, 1 - p).log().mean()), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(float((hits == true).double().mean()))
    assert found["val_exact_match"] == pytest.approx(float((hits == true).all(-1).double().mean()))
    f1 = 2 * (hits & true).sum(0) / (hits.sum(0) + true.sum(0)).clamp(min=1)
    assert found["val_f1"] == pytest.approx(float(f1.double().mean()))
    assert module.model.config.problem_type == "multi_label_classification"
    torch.testing.assert_close(module.model(**inputs).loss, module._evaluate(inputs, None)[0])
    del inputs["labels"]
    for row, values in zip(module.predict_step(inputs, 0), p.tolist()):
        assert row["labels"] == [name for name, value in zip("abc", values) if value >= 0.5]
        assert list(row["probabilities"].values()) == [round(value, 4) for value in values]


def test_several_labels_are_weighed_against_their_absence(pretrained: str) -> None:
    module = SequenceClassification(pretrained, ["a", "b", "c"], "balanced", problem_type="multi_label_classification")
    module.configure_model()
    data = SimpleNamespace(class_counts=[1, 2, 5], train_rows=range(10))
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.on_fit_start()
    assert module._weight is not None and module._weight.tolist() == [9, 4, 1]
    inputs = batch() | {"labels": SEVERAL}
    loss, logits, _ = module._evaluate(inputs, module._weight)
    expected = SEVERAL * module._weight * -logsigmoid(logits) - (1 - SEVERAL) * logsigmoid(-logits)
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize("names", [["score"], ["one", "other"]])
def test_numbers(names: list[str], pretrained: str) -> None:
    module = SequenceClassification(pretrained, names, problem_type="regression")
    labels = torch.tensor([[0.5, 3.0], [-2.0, 1.0], [1.5, 0.0]])[:, : len(names)]
    inputs = batch() | {"labels": labels}
    found = logged(module, inputs)
    del inputs["labels"]
    values = module(**inputs).detach().double()
    errors = values - labels
    assert found["val_loss"] == pytest.approx(float(errors.square().mean()), rel=1e-5)
    assert found["val_rmse"] == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-5)
    assert found["val_mae"] == pytest.approx(float(errors.abs().mean()), rel=1e-5)
    if len(names) == 1:
        pearson = torch.corrcoef(torch.stack([values[:, 0], labels[:, 0].double()]))[0, 1]
        ranks = torch.stack([values[:, 0].argsort().argsort(), labels[:, 0].argsort().argsort()]).double()
        assert found["val_pearson"] == pytest.approx(float(pearson), rel=1e-4)
        assert found["val_spearman"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), rel=1e-4)
    predicted = [dict(zip(names, (round(value, 4) for value in row))) for row in module(**inputs).tolist()]
    assert module.predict_step(inputs, 0) == predicted


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_a_run_learns_what_rows_hold(problem_type: ProblemType, pretrained: str, tmp_path: Path) -> None:
    """From the file to the prediction: w1 has one label, w2 both, w3 none; or their numbers."""
    answers: dict[str, list[float]] = {"w1": [1, 0], "w2": [1, 1], "w3": [0, 0]}
    rows = [{"text": word, "a": a, "b": b} for word, (a, b) in answers.items()] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = LabelledTextData(
        str(tmp_path / "rows.jsonl"), val_fraction=0, batch_size=6, predict_path=str(tmp_path / "rows.jsonl")
    )
    module = SequenceClassification(pretrained, ["a", "b"], lr=2e-2, problem_type=problem_type)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=12, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    found = [row for part in trainer.predict(module, data) or [] for row in part][:3]
    values = [list(row.get("probabilities", row).values()) for row in found]
    assert torch.allclose(torch.tensor(values), torch.tensor([*answers.values()]).float(), atol=0.3)


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
        ([], None, "expected two names or more"),
    ],
)
def test_bad_settings(labels: list[str], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassification("model", labels, weights)


def test_numbers_have_no_weights(pretrained: str) -> None:
    with pytest.raises(ValueError, match="Found class_weights=balanced for numbers"):
        SequenceClassification("model", ["score"], "balanced", problem_type="regression")
    with pytest.raises(ValueError, match="Found problem_type='ranking', expected one of single_label_classification, "):
        SequenceClassification("model", ["score"], problem_type="ranking")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one name or more"):
        SequenceClassification("model", [], problem_type="regression")
