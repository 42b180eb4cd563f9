"""What the decoder of an encoder-decoder model reads where it is given labels alone."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_lora.eval_mode import evaluating

Inputs = dict[str, Tensor]


def _shifted(model: Any, labels: Tensor) -> Inputs:
    return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}


def _shifted_and_masked(model: Any, labels: Tensor) -> Inputs:
    # As EncoderDecoderModel does.
    ids = _shifted(model, labels)
    return {**ids, "decoder_attention_mask": (ids["decoder_input_ids"] != model.config.pad_token_id).long()}


_WAYS = (_shifted, _shifted_and_masked)
_KNOWN: WeakKeyDictionary[nn.Module, Callable[[Any, Tensor], Inputs] | None] = WeakKeyDictionary()


def decoder_inputs(model: Any, call: Callable[..., Any], batch: Inputs) -> Inputs | None:
    """What to give a model in place of labels for the same forward pass.

    Which of the known ways is the model's is found once, by what comes to its head for a few labels.

    Args:
        model: The model.
        call: What to call in its place.
        batch: With labels.

    Returns:
        ``None`` for a model that does it in another way.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _find(model, call, batch)
    way = _KNOWN[model]
    return None if way is None else way(model, batch["labels"])


@torch.no_grad()
def _find(model: Any, call: Callable[..., Any], batch: Inputs) -> Callable[[Any, Tensor], Inputs] | None:
    head = model.get_output_embeddings() if hasattr(model, "prepare_decoder_input_ids_from_labels") else None
    if not isinstance(head, nn.Module):
        return None
    labels = batch["labels"][:, :4].clone()
    labels[:, :1] = -100  # which a later position must not see, if the model masks it
    rest = {name: value for name, value in batch.items() if name != "labels"}
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[:1]), prepend=True)
    try:
        with evaluating(model):
            call(**rest, labels=labels)
            for way in _WAYS:
                call(**rest, **way(model, labels))
    finally:
        hook.remove()
    if len(seen) != 1 + len(_WAYS):
        return None
    return next((way for way, found in zip(_WAYS, seen[1:]) if torch.allclose(found, seen[0], rtol=1e-4)), None)
