"""A frozen base in another precision than what is trained."""

import torch
from torch import nn

from lightning_lora.model.quantization import quantized_layers
from lightning_lora.model.record import base_parameters, injections_of
from lightning_lora.sharding import BEFORE_SHARDING, is_sharded


@torch.no_grad()
def cast_base(root: nn.Module, dtype: torch.dtype, is_mixed: bool) -> None:
    """Cast the frozen floating-point parameters of a model with adapters, and leave all that is trained.

    Buffers stay, and so do the parameters beside them in normalization layers with running statistics; quantized
    weights too.

    Args:
        root: What has the adapters.
        dtype: The type.
        is_mixed: Whether autocast lets modules of several types work together.

    Raises:
        ValueError: If it does not and there would be such, or if processes share the model already.
    """
    in_full = (
        {} if is_mixed else {n: t for found in injections_of(root) for n, t in found.tensors(found.trained).items()}
    )
    others = [name for name, tensor in in_full.items() if tensor.dtype != dtype]
    if others:
        raise ValueError(
            f"{others[0]} is trained in full in {in_full[others[0]].dtype}, and would meet a base in {dtype}: use "
            'precision="bf16-mixed", which casts between them, or modules_to_save=None and bias="none". Nothing was '
            "changed."
        )
    if is_sharded(root):
        raise ValueError(
            f"base_dtype={str(dtype).removeprefix('torch.')!r} comes too late for a model that is sharded already: "
            f"{BEFORE_SHARDING}. Nothing was changed."
        )
    kept = {id(tensor) for *_, storage, packed in quantized_layers(root) for tensor in storage.tensors(packed)}
    for module in root.modules():
        if any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
            kept.update(map(id, module.parameters(recurse=False)))
    for _, parameter in base_parameters(root):
        if parameter.is_floating_point() and id(parameter) not in kept and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # under the same object, for ties and optimizers
