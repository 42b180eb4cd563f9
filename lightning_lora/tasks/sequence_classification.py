"""Classification of texts or of pairs of texts."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.labels import MULTI_LABEL, REGRESSION
from lightning_lora.pretrained import load_classifier, load_tokenizer
from lightning_lora.tasks.classification import Classification


class SequenceClassification(Classification):
    """An encoder (or decoder) of transformers with a classification head, new where the checkpoint has none.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>``.
        labels: Names of the classes, the same as in the data.
        class_weights: Weight of each class in the training loss, ``"balanced"``, or ``None`` (default) for equal ones.
        lr: Peak learning rate of AdamW. Default 5e-4, one for LoRA; full fine-tuning wants about 1e-4.
        weight_decay: Weight decay of AdamW. Default 0.0.
        warmup_steps: Optimizer steps of linear warm-up. Default 0.
        problem_type: ``single_label_classification`` (default), ``multi_label_classification`` or ``regression``.

    Raises:
        ValueError: If labels or weights do not fit.
    """

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model and its tokenizer."""
        self.tokenizer = load_tokenizer(self.pretrained)
        return load_classifier(self.pretrained, self.tokenizer, dtype, **self.label_settings())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """``{"label": ..., "probability": ...}`` for each row.

        Where a row has several labels, ``{"labels": [...], "probabilities": {...}}``, with those of at least one half;
        where it has numbers, each by its name.
        """
        logits = self(**batch).float()
        if self.problem_type == REGRESSION:
            return [_named(self.labels, values) for values in logits.tolist()]
        if self.problem_type == MULTI_LABEL:
            found = [_named(self.labels, values) for values in logits.sigmoid().tolist()]
            return [
                {"labels": [name for name, value in row.items() if value >= 0.5], "probabilities": row} for row in found
            ]
        probabilities = logits.softmax(-1).max(-1)
        return [
            {"label": self.labels[index], "probability": round(value, 4)}
            for value, index in zip(probabilities.values.tolist(), probabilities.indices.tolist())
        ]


def _named(labels: list[str], values: list[float]) -> dict[str, float]:
    return {label: round(value, 4) for label, value in zip(labels, values)}
