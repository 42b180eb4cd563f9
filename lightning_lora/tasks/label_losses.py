"""The loss of a language model, with logits where something is learned alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lightning_lora.compiled import is_compiled
from lightning_lora.tasks.chunked_losses import token_losses
from lightning_lora.tasks.decoder_inputs import decoder_inputs
from lightning_lora.tasks.known_logits import LogitTransform, transform_of

IGNORED = -100


def language_model_loss(
    model: Any,
    batch: dict[str, Tensor],
    *,
    label_smoothing: float = 0.0,
    tokens: int | Tensor | None = None,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """The loss of a causal or encoder-decoder model of transformers: ``model(**batch).loss`` in less memory and time.

    Logits are made at learned positions alone, some at a time, so that those of a whole batch are never in memory. An
    adapted or trained head, hooks on it, soft-capped and scaled logits are as in the model's own forward pass. A model
    that computes its loss otherwise, and one that is compiled whole, are left to their own.

    Example::

        def training_step(self, batch, batch_idx):
            return language_model_loss(self.model, batch)

    Args:
        model: The model.
        batch: What it takes, with ``labels`` of shape ``(rows, length)``, -100 where nothing is learned.
        label_smoothing: Share of each label that is spread over the vocabulary. Default 0.
        tokens: What to divide the sum of the losses by, such as the number of label tokens of several batches whose
            gradients are added. Default ``None``: the number of this batch's.
        forward: What to call in the model's place, where more than the batch goes into it. Default ``None``.

    Returns:
        The mean loss per label token (natural logarithm), and 0 for a batch without.
    """
    batch = _without_cache(model, batch, forward)
    found = _learned_losses(model, batch, label_smoothing, forward or model)
    if found is None and not label_smoothing and tokens is None:
        loss: Tensor = (forward or model)(**batch).loss
        return loss
    losses = (
        found if found is not None else label_losses(model, batch, label_smoothing=label_smoothing, forward=forward)
    )
    if tokens is None:
        tokens = max(1, losses.numel() if found is not None else label_tokens(model, batch["labels"]))
    return losses.sum() / tokens


def label_losses(
    model: Any, batch: dict[str, Tensor], *, label_smoothing: float = 0.0, forward: Callable[..., Any] | None = None
) -> Tensor:
    """The loss of each label token, the negative of its log-probability: :func:`language_model_loss`, not reduced.

    Returns:
        Of the shape of the labels, zero where nothing is learned, in float32 or better.
    """
    batch = _without_cache(model, batch, forward)
    labels, learned = _labels(model, batch["labels"])
    found = _learned_losses(model, batch, label_smoothing, forward or model)
    if found is not None:
        return found.new_zeros(labels.shape).masked_scatter(learned.to(found.device), found)
    inputs = _inputs(model, forward or model, batch)
    logits = (forward or model)(**(batch if inputs is None else inputs)).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not _encodes(model):
        logits = pad(logits, (0, 0, 1, -1))  # to where their labels are
    return cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )


def label_tokens(model: Any, labels: Tensor) -> int:
    """How many label tokens count: of a causal model, never the first of a row, which nothing predicts."""
    return int(_labels(model, labels)[1].sum())


def _learned_losses(
    model: Any, batch: dict[str, Tensor], label_smoothing: float, call: Callable[..., Any]
) -> Tensor | None:
    """The losses at learned positions, of shape ``(label tokens,)``, if the model's forward pass is a known one."""
    if is_compiled(model) or torch.compiler.is_compiling():  # for a hook would have all compiled again each time
        return None
    inputs = _inputs(model, call, batch)
    if inputs is None:
        return None
    transform = transform_of(model, call, {**inputs, "labels": batch["labels"]}, shifted=not _encodes(model))
    return None if transform is None else _at_head(model, batch["labels"], inputs, label_smoothing, call, transform)


def _at_head(
    model: Any,
    labels: Tensor,
    inputs: dict[str, Tensor],
    label_smoothing: float,
    call: Callable[..., Any],
    transform: LogitTransform,
) -> Tensor | None:
    """Run the model, with the losses computed where its head is called, while its weights are gathered there."""
    labels, learned = _labels(model, labels)
    positions = learned if _encodes(model) else pad(learned, (0, 1))[:, 1:]
    found: list[Tensor] = []

    def compute(head: nn.Module, arguments: tuple[Any, ...]) -> Any:
        hook.remove()  # the losses call the head
        hidden = arguments[0]
        if hidden.shape[:2] != labels.shape:
            return None
        rows, of_rows = hidden[positions.to(hidden.device)], labels[learned].to(hidden.device)
        found.append(token_losses(head, rows, of_rows, transform, label_smoothing))
        return hidden[:1, :1].detach(), *arguments[1:]  # which must give something

    hook = model.get_output_embeddings().register_forward_pre_hook(compute, prepend=True)
    try:
        call(**inputs)
    finally:
        hook.remove()
    return found[0] if found else None


def _labels(model: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels without those that nothing predicts, and where there are some."""
    if not _encodes(model):
        labels = labels.clone()
        labels[:, 0] = IGNORED
    return labels, labels != IGNORED


def _without_cache(model: Any, batch: dict[str, Any], forward: Callable[..., Any] | None) -> dict[str, Any]:
    """The batch, and no cache of keys, with which transformers lets packed rows see each other."""
    keeps = forward is None and "position_ids" in batch and getattr(model.config, "use_cache", False)
    return {"use_cache": False, **batch} if keeps else batch


def _inputs(model: Any, call: Callable[..., Any], batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The batch without labels; ``None`` where the model alone knows what its decoder is to read."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not _encodes(model) or "decoder_input_ids" in batch:
        return inputs
    found = decoder_inputs(model, call, batch)
    return None if found is None else inputs | found


def _encodes(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)
