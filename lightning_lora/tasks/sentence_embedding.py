"""Embeddings of texts, near to each other where texts belong together."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lightning_lora.pretrained import load_tokenizer, resolve
from lightning_lora.tasks.fine_tuning import FineTuning

Pooling = Literal["mean", "cls", "last"]


class SentenceEmbedding(FineTuning):
    """An encoder (or decoder) of transformers whose pooled, normalized states are embeddings, trained by pairs.

    The loss is InfoNCE (van den Oord et al., arXiv 1807.03748), also known as multiple negatives ranking: of each
    anchor, the cross-entropy of its positive among the positives and negatives of the whole batch of a process, by
    their cosine similarity over a temperature. A text that belongs to the anchor by another row of the batch is not
    among them. Larger batches are harder, and teach more.

    Logged are ``train_loss``, ``val_loss``, and over all pairs held out ``val_mrr``, ``val_hit_rate_1`` and
    ``val_hit_rate_10``: where among all positives each anchor finds its own; and the same for ``test``.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>``.
        pooling: What stands for a text: the ``"mean"`` (default) of its tokens, the first of them (``"cls"``), or the
            ``"last"``.
        temperature: What similarities are divided by. Default 0.05.
        lr: Peak learning rate of AdamW. Default 5e-4, one for LoRA.
        weight_decay: Weight decay of AdamW. Default 0.0.
        warmup_steps: Optimizer steps of linear warm-up. Default 0.

    Raises:
        ValueError: If ``temperature`` is not positive, or there is no such pooling.
    """

    def __init__(
        self,
        pretrained: str,
        pooling: Pooling = "mean",
        temperature: float = 0.05,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        from lightning_lora.tasks.pair_retrieval import PairRetrieval

        super().__init__(pretrained, lr, weight_decay, warmup_steps)
        self.save_hyperparameters()
        if pooling not in ("mean", "cls", "last"):
            raise ValueError(f"Found pooling={pooling!r}, expected 'mean', 'cls' or 'last'.")
        if temperature <= 0:
            raise ValueError(f"Found temperature={temperature}, expected a positive number such as 0.05.")
        self.pooling = pooling
        self.temperature = temperature
        self.val_retrieval, self.test_retrieval = PairRetrieval(), PairRetrieval()

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model and its tokenizer."""
        from transformers import AutoModel

        self.tokenizer = load_tokenizer(self.pretrained)
        model = AutoModel.from_pretrained(resolve(self.pretrained), dtype=dtype)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # which is for classification: nothing would be learned in it
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of texts, of shape ``(texts, size)`` and length 1, in float32 or better."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        weights = self._pooled(attention_mask).to(states)
        return normalize(torch.einsum("tls,tl->ts", states, weights), dim=-1)

    def on_fit_start(self) -> None:
        """Make sure that a batch has texts that do not belong together.

        Raises:
            ValueError: If it has one pair alone, and as in the base class.
        """
        super().on_fit_start()
        if getattr(getattr(self.trainer, "datamodule", None), "batch_size", 2) < 2:
            raise ValueError("Found batch_size=1, expected several pairs, such as 64. Raise data.batch_size.")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        loss = self._loss(batch, self._embed(batch))
        self.log("train_loss", loss, batch_size=batch["rows"], prog_bar=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        """Log ``val_mrr``, ``val_hit_rate_1`` and ``val_hit_rate_10``."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test_mrr``, ``test_hit_rate_1`` and ``test_hit_rate_10``."""
        self._report("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """``{"text": ..., "embedding": [...]}`` for each row."""
        found = self._embed(batch).tolist()
        return [{"text": text, "embedding": embedding} for text, embedding in zip(batch["text"], found)]

    def _embed(self, batch: dict[str, Any]) -> Tensor:
        embeddings: Tensor = self(batch["input_ids"], batch["attention_mask"])
        return embeddings

    def _loss(self, batch: dict[str, Any], embeddings: Tensor) -> Tensor:
        rows, keys = batch["rows"], batch["keys"]
        anchors, candidates = embeddings[:rows], embeddings[rows:]
        same_anchor = keys[:rows, None] == keys[:rows]
        is_positive = keys[rows : 2 * rows, None] == keys[rows:]
        belongs = (same_anchor.float() @ is_positive.float()).bool().fill_diagonal_(False)
        scores = (anchors @ candidates.T / self.temperature).masked_fill(belongs, -torch.inf)
        return cross_entropy(scores, torch.arange(rows, device=scores.device))

    def score(self, batch: dict[str, Any], stage: str) -> None:
        """Log the loss, and add the pairs to those of which each anchor is to find its own."""
        rows, embeddings = batch["rows"], self._embed(batch)
        keys = batch["keys"][: 2 * rows].view(2, rows).T
        getattr(self, f"{stage}_retrieval").update(embeddings[:rows], embeddings[rows : 2 * rows], keys)
        self.log(f"{stage}_loss", self._loss(batch, embeddings), batch_size=rows, prog_bar=True, sync_dist=True)

    def _report(self, stage: str) -> None:
        retrieval = getattr(self, f"{stage}_retrieval")
        values = {f"{stage}_{name}": value for name, value in retrieval.compute().items()}
        self.log_dict(values, prog_bar=True, sync_dist=True)
        retrieval.reset()

    def _pooled(self, mask: Tensor) -> Tensor:
        """What each token counts for its text."""
        if self.pooling == "mean":
            return mask / mask.sum(-1, keepdim=True)
        places = torch.arange(mask.shape[1], device=mask.device)
        ends = (places * mask).argmax(-1) if self.pooling == "last" else mask.argmax(-1)
        return (places == ends[:, None]).int()
