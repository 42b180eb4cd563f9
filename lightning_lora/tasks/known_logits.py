"""What a language model of transformers does between its output head and its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lora.eval_mode import evaluating


@dataclass(frozen=True)
class LogitTransform:
    """Scale, soft cap and bias between the output of a head and a model's logits, as Cohere, Gemma and Marian have."""

    scale: float
    cap: float | None
    bias: Tensor | None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits if self.bias is None else logits + self.bias.to(logits)


_KNOWN: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


def transform_of(
    model: Any, call: Callable[..., Any], batch: dict[str, Tensor], shifted: bool
) -> LogitTransform | None:
    """How a model makes its logits of its head's output, if its loss is the ordinary cross-entropy of these.

    It is found once, by a forward pass in which the head gives chosen values: what the model makes of them shows scale,
    cap and bias, and further values and its loss must then be as expected.

    Args:
        model: The model.
        call: What to call in its place.
        batch: A batch, of which the labels are not used.
        shifted: Whether a token's logits are at the position before it.

    Returns:
        ``None`` for a model that does anything else, whose own loss must be used.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _find(model, call, batch, shifted)
    return _KNOWN[model]


@torch.no_grad()
def _find(model: Any, call: Callable[..., Any], batch: dict[str, Tensor], shifted: bool) -> LogitTransform | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        return None
    given: list[Tensor] = []

    def one_row(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (arguments[0][:1, :1], *arguments[1:]) if arguments else None

    def chosen(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        given.append(_values(output))
        return given[-1]

    hooks = [head.register_forward_pre_hook(one_row, prepend=True), head.register_forward_hook(chosen)]
    labels = torch.tensor([[0, 1, -100, -100, 1, 1, 0]], device=batch["labels"].device)
    try:
        with evaluating(model):
            output = call(**{**batch, "labels": labels})
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None  # it needs logits for each of its own positions
    finally:
        for hook in hooks:
            hook.remove()
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    if len(given) != 1 or logits is None or loss is None or logits.shape != given[0].shape:
        return None
    if getattr(output, "aux_loss", None) is not None:  # of a router, which is in the loss
        return None
    found = _fit(given[0].double(), logits.double())
    pairs = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    expected = cross_entropy(pairs[0].flatten(0, 1).double(), pairs[1].flatten())
    known = torch.allclose(found(given[0].double()), logits.double(), rtol=1e-5, atol=1e-4)
    return found if known and torch.isclose(expected, loss.double(), rtol=1e-5) else None


_SMALL, _LARGE = 2.0**-14, 2.0**20


def _values(output: Tensor) -> Tensor:
    """Zeros, a small number, a large one, and wide random ones, of shape ``(1, 7, vocabulary)``."""
    wide = 30 * torch.randn(4, output.shape[-1], generator=torch.Generator().manual_seed(0))
    constant = torch.tensor([0.0, _SMALL, _LARGE])[:, None].expand(-1, output.shape[-1])
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.cat([constant, wide])[None].to(output.device, dtype)


def _fit(given: Tensor, logits: Tensor) -> LogitTransform:
    bias, small, large = logits[0, :3]
    scale = float((small - bias).median()) / _SMALL
    top = float((large - bias).median())
    cap = None
    if abs(top - scale * _LARGE) > 1e-3 * abs(scale * _LARGE):
        cap = top
    else:
        scale = top / _LARGE
    whole = float(round(scale))
    return LogitTransform(whole if abs(scale - whole) < 1e-6 else scale, cap, bias if bias.any() else None)
