"""Optimizer groups: which parameters, at which learning rate."""

from typing import Any

from torch import nn

from lightning_lora.sharding import full_shape, named_tensors


def param_groups(
    model: nn.Module, lr: float, lora_plus_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups over the trainable parameters, for ``configure_optimizers``.

    With a ratio above 1, B learns faster than A (Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv 2402.12354, who recommend 16).

    Args:
        model: A model with adapters.
        lr: Learning rate of A and of every other trainable parameter.
        lora_plus_ratio: The learning rate of B over ``lr``.
        weight_decay: Of matrices; biases, other vectors and the rows of ``trainable_token_indices`` get none.

    Returns:
        At most three groups, for any ``torch.optim`` optimizer; groups without parameters are left out.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # A vector and a matrix are told apart by the whole of them, where this process holds a part.
    dims = {id(getattr(module, name)): len(full_shape(module, name)) for _, module, name in named_tensors(model)}
    fast = [parameter for name, parameter in trainable if name.endswith("lora_B")]
    slow = [(name, parameter) for name, parameter in trainable if not name.endswith("lora_B")]
    # The rows of tokens are whole weights, not updates: decay would shrink those that a batch has not even looked up.
    decayed = [p for name, p in slow if dims[id(p)] > 1 and not name.endswith("trainable_tokens")]
    others = [p for name, p in slow if dims[id(p)] <= 1 or name.endswith("trainable_tokens")]
    groups: list[dict[str, Any]] = [
        {"params": fast, "lr": lr * lora_plus_ratio, "weight_decay": weight_decay},
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
