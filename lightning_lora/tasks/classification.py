"""What classification of texts, of tokens and of images share: labels, their weights and metrics."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lora.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType
from lightning_lora.tasks.fine_tuning import FineTuning
from lightning_lora.tasks.problems import PROBLEMS

IGNORED = -100
ClassWeights = list[float] | Literal["balanced"] | None


class Classification(FineTuning):
    """Cross-entropy over labels, with accuracy, macro F1 and Matthews correlation in validation and test.

    Logged are ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1``, ``val_mcc``, and the same for ``test``. Where
    a row has several labels, the loss is the binary cross-entropy of each, and ``val_exact_match`` is logged too. Where
    it has numbers, the loss is the squared error, and ``val_mae``, ``val_rmse`` and, of one number, ``val_pearson`` and
    ``val_spearman`` are logged.

    Args:
        pretrained: See :class:`FineTuning`.
        labels: Names of the classes, in the order of their indices.
        class_weights: Weight of each class in the training loss, ``"balanced"`` for weights inverse to the number of
            training rows of each (the data module must have ``class_counts``), or ``None`` for equal ones. Of several
            labels, they weigh the rows that have a label against those that do not.
        lr: See :class:`FineTuning`, as for the rest.
        weight_decay: See there.
        warmup_steps: See there.
        problem_type: What the labels of a row are, as transformers calls it: ``single_label_classification`` (default),
            ``multi_label_classification`` or ``regression``.

    Raises:
        ValueError: If there are fewer than two labels where a row has one, one is there twice, or the weights are not
            one for each.
    """

    def __init__(
        self,
        pretrained: str,
        labels: list[str],
        class_weights: ClassWeights = None,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        problem_type: ProblemType = "single_label_classification",
    ) -> None:
        super().__init__(pretrained, lr, weight_decay, warmup_steps)
        self.save_hyperparameters()
        if problem_type not in PROBLEMS:
            raise ValueError(f"Found problem_type={problem_type!r}, expected one of {', '.join(PROBLEMS)}.")
        least = 2 if problem_type == SINGLE_LABEL else 1
        if len(labels) < least or len(set(labels)) < len(labels):
            raise ValueError(
                f"Found labels={labels}, expected {('one name', 'two names')[least - 1]} or more, each once."
            )
        if class_weights is not None and problem_type == REGRESSION:
            raise ValueError(f"Found class_weights={class_weights} for numbers, which have no classes. Leave them out.")
        if isinstance(class_weights, list) and len(class_weights) != len(labels):
            raise ValueError(
                f"Found {len(class_weights)} class_weights for {len(labels)} labels, expected one for each label."
            )
        self.labels = labels
        self.problem_type = problem_type
        self._problem = PROBLEMS[problem_type]
        self.class_weights = class_weights
        self._weight: Tensor | None = None
        self.val_metrics, self.test_metrics = self._metrics("val_"), self._metrics("test_")

    def label_settings(self) -> dict[str, Any]:
        """The labels, as the config of a transformers model takes them."""
        return {
            "num_labels": len(self.labels),
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits, of shape ``(..., number of labels)``."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    def on_fit_start(self) -> None:
        """Weigh the classes."""
        super().on_fit_start()
        if self.class_weights is None:
            return
        weights = self.class_weights
        if weights == "balanced":
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            counts = getattr(datamodule, "class_counts", None)
            if counts is None or 0 in counts:
                raise ValueError(
                    f"Found class_weights='balanced' and class_counts={counts} of the data module, expected a training "
                    "row of every class at least. Give the weights as a list, or add rows."
                )
            weights = [sum(counts) / (len(counts) * count) for count in counts]
            if self.problem_type == MULTI_LABEL:
                rows = len(datamodule.train_rows)
                weights = [(rows - count) / count for count in counts]
        self._weight = torch.tensor(weights, device=self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        loss, _, _ = self._evaluate(batch, self._weight)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def score(self, batch: dict[str, Tensor], stage: str) -> None:
        """Log the loss and the metrics."""
        metrics, (loss, logits, labels) = getattr(self, f"{stage}_metrics"), self._evaluate(batch, None)
        metrics.update(*self._problem.scored(logits.float(), labels))
        # Weighing by the labels makes the epoch mean one over all of them.
        self.log(f"{stage}_loss", loss, batch_size=len(labels), prog_bar=True, sync_dist=True)
        self.log_dict(metrics, prog_bar=True)

    def _evaluate(self, batch: dict[str, Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits and labels, one for each label that counts."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = self(**inputs), batch["labels"]
        if self.problem_type == SINGLE_LABEL:
            labels = labels.flatten()
            counted = labels != IGNORED
            logits, labels = logits.flatten(end_dim=-2)[counted], labels[counted]
        return self._problem.loss(logits.float(), labels, weight), logits, labels

    def _metrics(self, prefix: str) -> Any:
        from torchmetrics import MetricCollection

        return MetricCollection(self._problem.metrics(len(self.labels)), prefix=prefix)
