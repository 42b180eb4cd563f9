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
    return _of_classes(task="multiclass", num_classes=labels)


def _of_several(labels: int) -> dict[str, Any]:
    from torchmetrics import ExactMatch

    given: dict[str, Any] = {"task": "multilabel", "num_labels": labels}
    return {**_of_classes(**given), "exact_match": ExactMatch(**given)}


def _of_classes(**given: Any) -> dict[str, Any]:
    from torchmetrics import Accuracy, F1Score, MatthewsCorrCoef

    return {
        "accuracy": Accuracy(**given, average="micro"),
        "f1": F1Score(**given, average="macro"),
        "mcc": MatthewsCorrCoef(**given),
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
