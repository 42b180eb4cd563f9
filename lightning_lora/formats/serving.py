"""What servers make of an adapter in PEFT's format: what they refuse, and what they would compute otherwise in silence.

The rules are those of the servers' own sources, which are named beside each.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from lightning_lora.formats.peft_config import config_from_peft
from lightning_lora.formats.peft_files import OF_LAYER, PeftFiles
from lightning_lora.fqn import listed

_FACTORS = r".*\.(lora_[AB]\.weight|lora_embedding_[AB])"


@dataclass(frozen=True)
class Server:
    """How a server reads an adapter.

    Attributes:
        scaling: The factor that it puts in front of ``B A``, given the settings and the rank of the tensors; ``None``
            if it is PEFT's own.
        tensors: The names of those that it knows, as one regular expression.
        on_others: What it does about others.
        refused: Settings that it refuses, and what they stand for.
    """

    scaling: Callable[[Mapping[str, Any], int], float] | None
    tensors: str = ".*"
    on_others: str = "ignores"
    refused: Mapping[str, str] = field(default_factory=dict)


def _by_settings(settings: Mapping[str, Any], rank: int) -> float:
    return float(settings["lora_alpha"] / settings["r"])


def _by_settings_or_root(settings: Mapping[str, Any], rank: int) -> float:
    return float(settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"]))


def _by_tensors(settings: Mapping[str, Any], rank: int) -> float:
    return float(settings["lora_alpha"] / rank)


def tensors_of_transformers(installed: str) -> str:
    """Those that this version reads: the magnitudes of DoRA find no place, and before 5.19 nothing but factors did."""
    is_old = tuple(map(int, installed.split(".")[:2])) < (5, 19)
    return _FACTORS if is_old else r"(?!.*\.lora_magnitude_vector).*"


SERVERS: Mapping[str, Server] = {
    # https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py: r, lora_alpha and use_rslora are read,
    # modules_to_save and use_dora refused, and keys that it has no field for dropped, as rank_pattern is;
    # vllm/lora/utils.py, parse_fine_tuned_lora_name: other tensors raise "unsupported LoRA weight".
    "vllm": Server(
        _by_settings_or_root,
        _FACTORS,
        "refuses",
        {"modules_to_save": "modules trained in full", "use_dora": "DoRA"},
    ),
    # https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py: scaling = lora_alpha / r for all
    # layers, and peft_type must be LORA; tensors of other names stay unused.
    "sglang": Server(_by_settings, _FACTORS),
    # https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py: lora_alpha is the one setting that is
    # taken along, to be divided by the rank of each tensor; a tensor that is neither A nor B ends it, but for weights
    # of base layers, which it leaves out, and of norms, which it keeps.
    "llama.cpp": Server(_by_tensors, rf"{_FACTORS}|.*\.base_layer\.weight|.*(_layernorm|\.norm).*", "refuses"),
    # https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/peft.py, load_adapter: PEFT's
    # inject_adapter_in_model reads it, which VeRA is not for.
    "transformers": Server(None, tensors_of_transformers(version("transformers"))),
    # https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/peft.py, load_lora_adapter: the rank is
    # that of the tensors and alpha the same, where their file does not say more; adapter_config.json is not read.
    "diffusers": Server(lambda settings, rank: 1.0, _FACTORS),
}


def served_otherwise(files: PeftFiles, server: str) -> list[str]:
    """What a server would refuse of an adapter, or compute otherwise, in words; empty if it serves what was trained.

    Args:
        files: The adapter.
        server: Its name in ``SERVERS``.

    Raises:
        CheckpointError: If the adapter cannot be read.
    """
    rules, settings = SERVERS[server], {"r": 8, "lora_alpha": 8, **files.settings}
    if settings["peft_type"] != "LORA":
        return [f"refuses an adapter of type {settings['peft_type']!r}"]
    config = config_from_peft(files.settings, files.config_file)
    found = [f"refuses {what} ({name})" for name, what in rules.refused.items() if settings.get(name)]
    others = [name for name in files.tensors if re.fullmatch(rules.tensors, name) is None]
    if others:
        found.append(f"{rules.on_others} {len(others)} tensors, such as {listed(sorted(others), 2)}")
    wrong: dict[tuple[float, float], list[str]] = {}
    for name, tensor in files.tensors.items():
        match = OF_LAYER.fullmatch(name)
        if match is None or match["inner"] not in ("lora_A.weight", "lora_embedding_A") or tensor.dim() < 2:
            continue
        trained = served = config.scaling(match["layer"])
        if rules.scaling is not None:
            served = rules.scaling(settings, len(tensor))
        if not math.isclose(trained, served, rel_tol=1e-6):
            wrong.setdefault((trained, served), []).append(match["layer"])
    for (trained, served), layers in wrong.items():
        found.append(
            f"scales the updates of {len(layers)} layers by {served:.4g}, which were trained with {trained:.4g}: "
            f"{listed(layers, 2)}"
        )
    return found
