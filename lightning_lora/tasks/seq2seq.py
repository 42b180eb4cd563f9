"""Fine-tuning of a model that reads one text and writes another."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.eval_mode import evaluating
from lightning_lora.pretrained import load_tokenizer, resolve
from lightning_lora.tasks.label_losses import label_tokens, language_model_loss
from lightning_lora.tasks.token_weighted import TokenWeighted


class Seq2Seq(TokenWeighted):
    """An encoder-decoder of transformers; validation writes its texts and scores them by ROUGE and BLEU.

    Logged are ``train_loss``, ``val_loss``, ``val_rouge1``, ``val_rougeL`` (F-measures) and ``val_bleu``, and the same
    for ``test``.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>``.
        from_encoder: Whether ``pretrained`` is an encoder such as BERT, of which both halves are made. The attention
            between them and the output head's transformation then start at random (Rothe et al., arXiv 1907.12461) and
            must be trained in full: ``modules_to_save: [crossattention, transform]``. Default false.
        max_new_tokens: Upper limit of a text that is written, in tokens. Default 64.
        lr: Peak learning rate of AdamW. Default 1e-3.
        weight_decay: Weight decay of AdamW. Default 0.0.
        warmup_steps: Optimizer steps of linear warm-up. Default 0.
        source_lang: Language of the sources, where the tokenizer has languages, such as ``en_XX``. Default ``None``.
        target_lang: The same for targets, of which the first token that is written is that of their language.
    """

    def __init__(
        self,
        pretrained: str,
        from_encoder: bool = False,
        max_new_tokens: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        source_lang: str | None = None,
        target_lang: str | None = None,
    ) -> None:
        super().__init__(pretrained, lr, weight_decay, warmup_steps)
        self.save_hyperparameters()
        self.from_encoder = from_encoder
        self.max_new_tokens = max_new_tokens
        self.source_lang = source_lang
        self.target_lang = target_lang
        self.val_metrics = _metrics()
        self.test_metrics = _metrics()

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model and its tokenizer."""
        from transformers import AutoModelForSeq2SeqLM, EncoderDecoderModel

        self.tokenizer = load_tokenizer(self.pretrained)
        path = resolve(self.pretrained)
        if not self.from_encoder:
            pretrained = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=dtype)
            if self.target_lang is not None:
                self._write_in(self.target_lang, pretrained.generation_config)
            return pretrained
        model: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(path, path, tie_encoder_decoder=False)
        model = model.to(dtype)
        model.config.decoder_start_token_id = self.tokenizer.cls_token_id
        model.config.eos_token_id = self.tokenizer.sep_token_id
        model.config.pad_token_id = self.tokenizer.pad_token_id
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(model.config, name))
        return model

    def _write_in(self, language: str, generation: Any) -> None:
        """Let what is written begin as the targets of a language do."""
        self.tokenizer.src_lang, self.tokenizer.tgt_lang = self.source_lang, language
        token = self.tokenizer.convert_tokens_to_ids(language)
        if self.tokenizer(text_target="a")["input_ids"][0] == token:
            generation.forced_bos_token_id = token  # mBART-50, NLLB, M2M100
        else:
            generation.decoder_start_token_id = token  # mBART, whose targets end with it

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        return self.weigh(*self._loss(batch, "train_loss", sync_dist=False))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, str]]:
        """``{"target": ...}`` for each row, written greedily."""
        return [{"target": text} for text in self.write(batch)]

    def write(self, batch: dict[str, Tensor]) -> list[str]:
        """The texts that the model writes for a batch of sources."""
        with evaluating(self.model):
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    def _loss(self, batch: dict[str, Tensor], name: str, sync_dist: bool) -> tuple[Tensor, int]:
        """The mean loss, logged, and over how many tokens it is."""
        loss = language_model_loss(self.model, batch)
        tokens = label_tokens(self.model, batch["labels"])
        self.log(name, loss, batch_size=tokens, prog_bar=True, sync_dist=sync_dist)
        return loss, tokens

    def score(self, batch: dict[str, Tensor], stage: str) -> None:
        """Log the loss, and add to the scores the texts that the model writes."""
        labels, metrics = batch["labels"], getattr(self, f"{stage}_metrics")
        self._loss(batch, f"{stage}_loss", sync_dist=True)
        padded = labels.masked_fill(labels == -100, self.tokenizer.pad_token_id)
        expected = self.tokenizer.batch_decode(padded, skip_special_tokens=True)
        written = self.write(batch)
        metrics["rouge"].update(written, expected)
        metrics["bleu"].update(written, [[text] for text in expected])

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all texts."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """The same for ``test``."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        metrics = getattr(self, f"{stage}_metrics")
        rouge = metrics["rouge"].compute()
        self.log_dict(
            {
                f"{stage}_rouge1": rouge["rouge1_fmeasure"],
                f"{stage}_rougeL": rouge["rougeL_fmeasure"],
                f"{stage}_bleu": metrics["bleu"].compute(),
            },
            prog_bar=True,
        )
        for metric in metrics.values():
            metric.reset()


def _metrics() -> torch.nn.ModuleDict:
    from torchmetrics.text import BLEUScore
    from torchmetrics.text.rouge import ROUGEScore

    return torch.nn.ModuleDict({"rouge": ROUGEScore(rouge_keys=("rouge1", "rougeL")), "bleu": BLEUScore(n_gram=2)})
