"""Whether a file's settings and its tensors are of one size: before any memory is taken for what the settings say."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.config import LoraConfig
from lightning_lora.formats.peft_files import OF_LAYER, PREFIX
from lightning_lora.fqn import clean_fqn, listed
from lightning_lora.layers import LoraParameters
from lightning_lora.layers.seal import wraps_tensors
from lightning_lora.model.finite import DTYPES, not_finite
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import find_modules_to_save, find_targets, parameters_in

# What has a row for each component of the rank, by the end of its name here and in PEFT.
_COUNTS_RANK = ("lora_A", "lora_A.weight", "lora_embedding_A", "vera_lambda_d")
Rows = dict[str, tuple[int, str]]


def rows_in_peft(tensors: Mapping[str, Tensor]) -> Rows:
    """By layer, how many rows the tensor that counts its rank has, and which it is, under PEFT's names."""
    found: list[tuple[str, str, str, Tensor]] = []
    for name, tensor in tensors.items():
        match = OF_LAYER.fullmatch(name)
        layer, _, inner = name.removeprefix(PREFIX).rpartition(".")  # of a registered kind, or trained in full
        found.append((*((layer, inner) if match is None else (match["layer"], match["inner"])), name, tensor))
    return _rows(found)


def rows_in_checkpoint(state_dict: Mapping[str, Any], module: str, adapter_name: str) -> Rows:
    """The same for one adapter of a checkpoint, by the names that layers have in the module that it was put on."""
    inside = re.escape(f"{module}." if module else "")
    pattern = re.compile(rf"{inside}(?P<layer>(?:.*?\.)?)lora\.{re.escape(adapter_name)}\.(?P<inner>.+)")
    found = ((pattern.fullmatch(clean_fqn(name)), name, tensor) for name, tensor in state_dict.items())
    return _rows(
        (match["layer"].rstrip("."), match["inner"], name, tensor)
        for match, name, tensor in found
        if match is not None and isinstance(tensor, Tensor)
    )


def _rows(found: Iterable[tuple[str, str, str, Tensor]]) -> Rows:
    counted: Rows = {}
    others: Rows = {}
    for layer, inner, name, tensor in found:
        shape = tuple(tensor.shape) or (1,)
        counts = inner.endswith(_COUNTS_RANK)
        # Experts are the first dimension of a stack, and what is fed in is the last of a matrix.
        rows = max(shape[:-1] or shape) if counts else max(shape)
        kept = counted if counts else others
        if rows >= kept.get(layer, (0, ""))[0]:
            kept[layer] = rows, name
    return {**others, **counted}  # a kind of somebody else's may have other tensors


def require_sizes(
    root: nn.Module, config: LoraConfig, tensors: Mapping[str, Any], rows: Rows, prefix: str, source: str
) -> None:
    """Require that an adapter takes no more memory than its file, but for what the model's own sizes ask for.

    Args:
        root: The model that it would be put into, with the names of the config.
        config: Its settings.
        tensors: Its tensors, by their names in the file.
        rows: What they say of ranks.
        prefix: What the names of the file begin with before those in ``root``.
        source: The file, for errors.

    Raises:
        CheckpointError: If a rank is larger than the tensors have, or a module to be trained in full is not there.
    """
    largest = max(rows.values(), default=(0, "none"))
    for target in find_targets(root, config).values():
        by_parameter = issubclass(target.layer_class, LoraParameters) and target.layer_class.by_parameter
        names = [f"{target.name}.{parameter}".lstrip(".") for parameter in target.parameters]
        rank = max(map(config.rank, names if by_parameter else [target.name]))
        there, name = rows.get(target.name, largest)
        if rank > there:
            raise CheckpointError(
                f"The tensors in {source} do not fit its settings, by which {target.name!r} has rank {rank}; of "
                f"another shape: {name} ({there} rows found, {rank} expected). Nothing was loaded."
            )
    there_in_full = {clean_fqn(name) for name in tensors}
    wanted = [f"{prefix}{name}" for name in parameters_in(find_modules_to_save(root, config))]
    missing = [name for name in map(clean_fqn, wanted) if name not in there_in_full]
    if missing:
        raise CheckpointError(
            f"The tensors in {source} do not fit its settings, by which modules_to_save trains these in full; missing: "
            f"{listed(missing)}. Nothing was loaded."
        )


def has_own_values(value: Any) -> bool:
    """Whether a tensor has a value of its own for each of its elements, as one that was expanded has not."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return True  # what else is wrong with it is said elsewhere
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def require_finite(tensors: Mapping[str, Any], source: str, done: str = "Nothing was loaded.") -> None:
    """Require tensors without a NaN and without an infinity.

    Args:
        tensors: By name; what is no ordinary tensor is left to others.
        source: What holds them, for errors.
        done: What became of them, for errors.

    Raises:
        CheckpointError: If some have one.
    """
    found = not_finite(
        {
            name: tensor
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
            and (isinstance(tensor, DTensor) or not wraps_tensors(tensor))
            and tensor.layout is torch.strided
            and tensor.dtype in DTYPES
            and not tensor.is_meta
            and has_own_values(tensor)
        }
    )
    if found:
        raise CheckpointError(
            f"{source} holds a NaN or an infinity in {listed(list(map(repr, found)))}: the training diverged, or the "
            f"file is damaged. Take an earlier one. {done}"
        )
