"""Classification of the words of a text: names, parts of speech, or the parts of a document."""

from typing import Any

import torch

from lightning_lora.data.spans import spans_of
from lightning_lora.pretrained import load_tokenizer, resolve
from lightning_lora.tasks.classification import Classification, ClassWeights


class TokenClassification(Classification):
    """An encoder of transformers with a head on each token; the first token of a word stands for it.

    The metrics are over words, not over spans.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>``.
        labels: Names of the tags, the same as in the data.
        class_weights: Weight of each tag in the training loss, ``"balanced"``, or ``None`` (default) for equal ones.
        lr: Peak learning rate of AdamW. Default 5e-4.
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
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(pretrained, labels, class_weights, lr, weight_decay, warmup_steps)

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model and its tokenizer."""
        from transformers import AutoModelForTokenClassification

        self.tokenizer = load_tokenizer(self.pretrained)
        return AutoModelForTokenClassification.from_pretrained(
            resolve(self.pretrained), dtype=dtype, **self.label_settings()
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """``{"tags": [...]}`` for each row, one for each word, or ``{"spans": [...]}`` of its text.

        A batch may hold several parts of a row, as many as ``batch["parts"]`` says of each; without it, one. Where
        ``batch["words"]`` says at which characters of a text its words are, there are the spans of
        :func:`~lightning_lora.data.spans.spans_of`.
        """
        first = batch["labels"] != -100
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "parts", "words")}
        found = self(**inputs).argmax(-1)
        tags = iter([[self.labels[i] for i in part[words].tolist()] for part, words in zip(found, first)])
        parts = batch.get("parts", [1] * len(found))
        rows = [[tag for _ in range(count) for tag in next(tags)] for count in parts]
        words = batch.get("words", [None] * len(rows))
        return [
            {"tags": row} if places is None else {"spans": spans_of(places, row)} for row, places in zip(rows, words)
        ]
