"""Whether a model keeps packed rows apart."""

from typing import Any

import torch

from lightning_lora.eval_mode import evaluating

_ROUNDING = 16 * torch.finfo(torch.float32).eps  # of float32, also in coarser types, which would hide what is seen


@torch.no_grad()
def require_separation(model: Any) -> None:
    """Require that no token attends to those of another row that shares its sequence.

    Two rows of four tokens are packed; changing the first must not change what the second gives.

    Args:
        model: A causal language model of transformers, which tells packed rows apart by their ``position_ids``.

    Raises:
        ValueError: If the second row sees the first.
    """
    device = next(model.parameters()).device
    first, other, second = torch.arange(12, device=device).view(3, 4) % model.config.get_text_config().vocab_size
    positions = torch.arange(4, device=device).repeat(2)[None]
    with evaluating(model):
        one, two = (
            model(input_ids=torch.cat([row, second])[None], position_ids=positions, use_cache=False).logits[0, 4:]
            for row in (first, other)
        )
    # Experts take the tokens of all rows together, and how many these are moves the last digits of what they give.
    if not torch.allclose(one, two, rtol=0, atol=_ROUNDING * float(one.abs().max())):
        raise ValueError(
            f"Found that {type(model).__name__} lets packed rows see each other, expected it to tell them apart by "
            "their position_ids, as the models of transformers that build their masks in one place do. Set packing to "
            "false in the data's settings."
        )
