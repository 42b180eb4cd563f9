"""An adapter in PEFT's format at other ranks: the best approximation of each layer's update, from the files alone."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.formats.model_card import Run, write_card
from lightning_lora.formats.peft_config import config_from_peft
from lightning_lora.formats.peft_files import CONFIG_FILE, OF_LAYER, PREFIX, WEIGHTS_FILE, read_files, write_weights
from lightning_lora.formats.publish import whole_directory
from lightning_lora.formats.verified import verify_adapter
from lightning_lora.layers.spectrum import decomposed
from lightning_lora.model.state_dict import CheckpointError

_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


class Resized(NamedTuple):
    """What became of one layer.

    Attributes:
        before: Its rank.
        after: Its rank now.
        error: How far the update is from what it was, in the Frobenius norm and relative to it.
    """

    before: int
    after: int
    error: float


@torch.no_grad()
def resize_adapter(
    source: str | Path, target: str | Path, r: int | None = None, energy: float | None = None
) -> dict[str, Resized]:
    """Write an adapter at smaller ranks: of each layer's update, the best approximation (Eckart and Young, 1936).

    Modules, biases and token rows that are trained in full go along as they are. The update is decomposed by its
    factors, so that nothing of a weight's size is made.

    Args:
        source: A directory in PEFT's format.
        target: The directory to write.
        r: The rank of every layer that has a larger one.
        energy: In place of it, the part of the sum of squares of each update that is to be kept, in ``(0, 1]``; each
            layer then has the smallest rank that does.

    Returns:
        What became of each layer, by name.

    Raises:
        ValueError: If not just one of ``r`` and ``energy`` is given, or it is out of range.
        CheckpointError: If the adapter is no plain LoRA of pairs of A and B. Nothing is written then.
    """
    if (r is None) == (energy is None) or (r is not None and r < 1) or not 0 < (1 if energy is None else energy) <= 1:
        raise ValueError(f"Give either a rank of 1 or more (r={r!r}) or an energy in (0, 1] (energy={energy!r}).")
    files, target = read_files(Path(source)), Path(target)
    config = config_from_peft(files.settings, files.config_file)
    pairs = _pairs(files.tensors, str(source))
    if files.settings["peft_type"] != "LORA" or config.takes_from_base or files.settings.get("use_bdlora"):
        raise CheckpointError(f"{source} is no plain LoRA on its base as it is, so it cannot be resized.")
    tensors, done = dict(files.tensors), {}
    for layer, (name_A, name_B) in pairs.items():
        lora_A, lora_B = tensors[name_A], tensors[name_B]
        left, values, right = decomposed((lora_A, lora_B))
        kept = min(r, len(values)) if r is not None else _smallest(values, float(energy or 1))
        root = (values[:kept] * abs(config.scaling(layer))).sqrt()
        shape_A, shape_B = (kept, *lora_A.shape[1:]), (len(lora_B), kept, *lora_B.shape[2:])
        tensors[name_A] = (root.unsqueeze(1) * right[:kept]).to(lora_A.dtype).reshape(shape_A).contiguous()
        tensors[name_B] = (left[:, :kept] * root).to(lora_B.dtype).reshape(shape_B).contiguous()
        whole, lost = float((values**2).sum()), float((values[kept:] ** 2).sum())
        done[layer] = Resized(len(lora_A), kept, (lost / whole) ** 0.5 if whole else 0.0)
    settings = {**files.settings, **_ranks({layer: each.after for layer, each in done.items()})}
    with whole_directory(target) as new:
        write_weights(new / WEIGHTS_FILE, tensors, files.fingerprint, files.start, files.quantization)
        (new / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        verify_adapter(new, settings, tensors, [])
        largest = max((each.error for each in done.values()), default=0.0)
        write_card(new, settings, Run({"resized": f"largest relative error of an update {largest:.2g}"}))
    return done


def _pairs(tensors: dict[str, Tensor], source: str) -> dict[str, tuple[str, str]]:
    """The names of A and B of each layer."""
    matches = {name: OF_LAYER.fullmatch(name) for name in tensors}
    found = {name: (match["layer"], match["depth"], match["inner"]) for name, match in matches.items() if match}
    odd = [name for name, (_, depth, inner) in found.items() if depth or inner not in {*_PAIRS, *_PAIRS.values()}]
    firsts = {layer: (name, _PAIRS[inner]) for name, (layer, _, inner) in found.items() if inner in _PAIRS}
    pairs = {layer: (name, f"{PREFIX}{layer}.{second}") for layer, (name, second) in firsts.items()}
    if odd or not pairs or len(found) != 2 * len(pairs) or not all(name_B in found for _, name_B in pairs.values()):
        raise CheckpointError(
            f"{source} cannot be resized, since it has "
            + (f"{odd[0]!r} beside A and B" if odd else "no pairs of one A and one B")
            + " (DoRA, VeRA, stacked experts and trained biases of B are not). Nothing was written."
        )
    return pairs


def _smallest(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps this part of the sum of squares."""
    kept = (values**2).cumsum(0)
    enough = kept >= energy * kept[-1] * (1 - 1e-12)  # which rounding may miss at an energy of one
    return int(enough.nonzero()[0]) + 1


def _ranks(ranks: dict[str, int]) -> dict[str, Any]:
    """Settings that give layers these ranks and a scaling of one."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(layer): rank for layer, rank in ranks.items() if rank != r}
    return {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
