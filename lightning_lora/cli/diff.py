"""``lightning-lora diff``: whether two saved adapters compute the same."""

import argparse
from typing import TypeVar

import torch
from rich.table import Table
from torch import Tensor

from lightning_lora.cli.terminal import console, printable
from lightning_lora.config import CHOOSING
from lightning_lora.formats.saved_adapter import SavedAdapter, read
from lightning_lora.layers import kind_of

_ROUNDING = 1e-6  # relative; what folding a scaling into B makes of it
_SPELLED = {*CHOOSING, "rank_pattern", "alpha_pattern", "target_parameters"}  # what these come to is compared
T = TypeVar("T")


def diff(given: argparse.Namespace) -> int:
    """Print what differs; gives the exit code: 1 if they compute something else.

    Raises:
        CheckpointError: If one is of a kind that this package does not have.
    """
    one, other = read(given.adapter), read(given.other)
    out, different = console(), False
    for name in sorted((one.settings.keys() & other.settings.keys()) - _SPELLED):
        if one.settings[name] != other.settings[name]:
            out.print(printable(f"{name}: {one.settings[name]!r} | {other.settings[name]!r}"), soft_wrap=True)
    updates, others = by_common_names(_updates(one), _updates(other))
    for where, missing in ((one.path, others.keys() - updates.keys()), (other.path, updates.keys() - others.keys())):
        if missing:
            different = True
            text = f"not in {where}: {len(missing)} tensors or updates, among them {min(missing)}"
            out.print(printable(text), soft_wrap=True)
    table = Table("layers and tensors that differ", "relative distance")
    for name in sorted(updates.keys() & others.keys()):
        distance = _distance(updates[name], others[name])
        if not distance <= _ROUNDING:
            different = True
            table.add_row(printable(name), f"{distance:.2e}")
    if table.row_count:
        out.print(table)
    out.print("different" if different else "the same")
    return int(different)


def by_common_names(one: dict[str, T], other: dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Both, by names without what those of the one have in front, as a LightningModule puts there."""
    for longer, shorter in ((one, other), (other, one)):
        for name in longer:
            dots = (place for place, character in enumerate(name) if character == ".")
            front = next((name[: dot + 1] for dot in dots if name[dot + 1 :] in shorter), None)
            if front is not None:
                cut = {each.removeprefix(front): value for each, value in longer.items()}
                return (cut, shorter) if longer is one else (shorter, cut)
    return one, other


def _updates(saved: SavedAdapter) -> dict[str, tuple[Tensor, ...]]:
    """Each layer's A and scaled B, and the other tensors that were trained, by name."""
    config, factors = saved.config(), saved.factors()
    drawn = kind_of(config).shared_names  # from a seed; some files hold them
    pairs = {f"{layer}.lora_{matrix}" for layer in factors for matrix in "AB"}
    rest = {name: (each,) for name, each in saved.named().items() if name not in pairs and not name.endswith(drawn)}
    return rest | {layer: (lora_A, config.scaling(layer) * lora_B) for layer, (lora_A, lora_B) in factors.items()}


def _update(lora_A: Tensor, lora_B: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
    """A and B as matrices, or stacks of them, whose product is the update; what is no such pair, as one tensor."""
    lora_A = lora_A.double()
    if lora_B is None:
        return lora_A
    lora_B = lora_B.double()
    if lora_A.dim() == lora_B.dim() == 3 and lora_B.shape[::2] == lora_A.shape[:2]:
        return lora_A, lora_B
    if lora_B.flatten(1).shape[1] == len(lora_A):
        return lora_A.flatten(1), lora_B.flatten(1)
    return torch.cat([lora_A.flatten(), lora_B.flatten()])


def _distance(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """How far two updates are apart, relative to the larger one; nothing of an update's size is made."""
    first, second = _update(*one), _update(*other)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape != second.shape:
            return float("inf")
        sizes = [float(torch.linalg.vector_norm(each)) for each in (first, second, first - second)]
    else:
        (A1, B1), (A2, B2) = first, second
        if (A1.shape[:-2], A1.shape[-1], B1.shape[-2]) != (A2.shape[:-2], A2.shape[-1], B2.shape[-2]):
            return float("inf")
        both = torch.cat([A1, A2], -2), torch.cat([B1, -B2], -1)
        sizes = [_norm(*pair) for pair in (first, second, both)]
    size = max(sizes[:2])
    return sizes[2] / size if size else 0.0


def _norm(lora_A: Tensor, lora_B: Tensor) -> float:
    """The norm of ``B A``, by triangles of the rank's size, which lose no digits where two updates are near."""
    triangles = [torch.linalg.qr(each, mode="r").R for each in (lora_B, lora_A.mT)]
    return float(torch.linalg.vector_norm(triangles[0] @ triangles[1].mT))
