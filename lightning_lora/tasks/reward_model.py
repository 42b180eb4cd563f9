"""A model that scores answers, learned from pairs of a better and a worse one."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_lora.pretrained import load_classifier, load_tokenizer
from lightning_lora.tasks.fine_tuning import FineTuning


class RewardModel(FineTuning):
    """A model of transformers with one number for each sequence, trained by the loss of Bradley and Terry.

    That is the negative log-probability that the chosen answer wins, where the odds are the exponential of the
    difference of the two rewards (Ouyang et al., arXiv 2203.02155, equation 1). A batch holds chosen answers in its
    first half and rejected ones in its second, as :class:`~lightning_lora.data.RewardData` makes it. Logged are
    ``train_loss``, ``val_loss`` (0.693 for a guess), ``val_accuracy`` (share of pairs whose chosen answer has the
    greater reward), ``val_margin`` (mean difference of the two), and the same for ``test``.

    The head is new where the checkpoint has none; LoRA trains it in full and stores it with the adapter.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>``.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.
        lr: Peak learning rate of AdamW. Default 2e-4.
        weight_decay: Weight decay of AdamW. Default 0.0.
        warmup_steps: Optimizer steps of linear warm-up. Default 0.
    """

    takes_single_answers = False  # which a data module may ask

    def __init__(
        self,
        pretrained: str,
        gguf_file: str | None = None,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        from torchmetrics.classification import BinaryAccuracy

        super().__init__(pretrained, lr, weight_decay, warmup_steps)
        self.save_hyperparameters()
        self.gguf_file = gguf_file
        self.val_accuracy, self.test_accuracy = BinaryAccuracy(), BinaryAccuracy()

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model and its tokenizer."""
        self.tokenizer = load_tokenizer(self.pretrained, self.gguf_file)
        return load_classifier(self.pretrained, self.tokenizer, dtype, self.gguf_file, num_labels=1)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Rewards, of shape ``(rows,)``, in float32 or better."""
        rewards: Tensor = self.model(**inputs).logits.squeeze(-1)
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        loss = -logsigmoid(self._margins(batch)).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, float]]:
        """``{"reward": ...}`` for each row with one answer, and ``{"chosen": ..., "rejected": ...}`` for each pair."""
        rewards = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        names = {1: ("reward",), 2: ("chosen", "rejected")}
        return [
            dict(zip(names[len(values)], (round(value, 4) for value in values.tolist())))
            for values in rewards.split(batch["answers"])
        ]

    def score(self, batch: dict[str, Tensor], stage: str) -> None:
        """Log loss, accuracy and margin."""
        accuracy, margins = getattr(self, f"{stage}_accuracy"), self._margins(batch)
        accuracy.update(torch.sigmoid(margins), torch.ones_like(margins, dtype=torch.int))
        values = {"loss": -logsigmoid(margins).mean(), "margin": margins.mean()}
        for name, value in values.items():
            self.log(f"{stage}_{name}", value, batch_size=len(margins), prog_bar=True, sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)

    def _margins(self, batch: dict[str, Tensor]) -> Tensor:
        """How much greater the reward of the chosen answer is, of shape ``(pairs,)``."""
        rewards: Tensor = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        chosen, rejected = rewards.chunk(2)
        return chosen - rejected
