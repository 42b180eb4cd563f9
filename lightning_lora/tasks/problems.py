"""What a classification learns by and is measured by: one label a row, several, or numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lightning_lora.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL


class Problem(NamedTuple):
    """A kind of labels.

    Args:
        loss: The mean loss of logits and labels, with a weight for each label or ``None``.
        metrics: The metrics of torchmetrics by name, for a number of labels.
        scored: What the metrics take of logits and labels.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    metrics: Callable[[int], dict[str, Any]]
    scored: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _of_one(labels: int) -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

    return {
        "accuracy": MulticlassAccuracy(labels, average="micro"),
        "f1": MulticlassF1Score(labels, average="macro"),
        "mcc": MulticlassMatthewsCorrCoef(labels),
    }


def _of_several(labels: int) -> dict[str, Any]:
    from torchmetrics.classification import (
        MultilabelAccuracy,
        MultilabelExactMatch,
        MultilabelF1Score,
        MultilabelMatthewsCorrCoef,
    )

    return {
        "accuracy": MultilabelAccuracy(labels, average="micro"),
        "exact_match": MultilabelExactMatch(labels),
        "f1": MultilabelF1Score(labels, average="macro"),
        "mcc": MultilabelMatthewsCorrCoef(labels),
    }


def _of_numbers(labels: int) -> dict[str, Any]:
    from torchmetrics import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

    found: dict[str, Any] = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
    return found | ({"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()} if labels == 1 else {})


PROBLEMS: dict[str, Problem] = {
    SINGLE_LABEL: Problem(cross_entropy, _of_one, lambda logits, labels: (logits, labels)),
    MULTI_LABEL: Problem(
        lambda logits, labels, weight: binary_cross_entropy_with_logits(logits, labels, pos_weight=weight),
        _of_several,
        lambda logits, labels: (torch.sigmoid(logits), labels.int()),
    ),
    REGRESSION: Problem(
        lambda logits, labels, weight: mse_loss(logits, labels),
        _of_numbers,
        lambda logits, labels: (logits.squeeze(-1), labels.squeeze(-1)),
    ),
}
