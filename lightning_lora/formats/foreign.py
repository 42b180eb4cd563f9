"""Adapters that other training libraries wrote: microsoft's loralib, litgpt and torchtune.

Their files hold A and B under names of their own, and litgpt and torchtune have other names for the layers too. All is
turned into PEFT's names and layouts, and from there on read like any adapter in PEFT's format.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.open_file import open_file, readable
from lightning_lora.formats.peft import load_tensors
from lightning_lora.formats.schema import require_names, require_type
from lightning_lora.formats.sizes import has_own_values
from lightning_lora.layers.fused_qkv import in_blocks, qkv_rows
from lightning_lora.model.finite import DTYPES
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import modules_by_name, pretrained_models

# The layers of a Llama-like model of transformers, by the names that litgpt and torchtune have for them.
_LITGPT = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Whether torchtune turns neighbors in its rotary embedding, by the model types of transformers that it has models of:
# https://github.com/meta-pytorch/torchtune/tree/main/torchtune/models, whose qwen2_hf_to_tune permutes nothing.
_TURNS_NEIGHBORS = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}
Factors = dict[str, tuple[Tensor, Tensor]]


def load_foreign_adapter(
    model: nn.Module, path: str | Path, lora_alpha: float | None = None, adapter_name: str = "default"
) -> nn.Module:
    """Load an adapter that loralib, litgpt or torchtune wrote; which one is told by the names of its tensors.

    - loralib: what ``torch.save(lora.lora_state_dict(model), path)`` wrote, for a model with the same module names.
      Linear and embedding layers, and ``MergedLinear`` on queries and values.
    - litgpt: ``lit_model.pth.lora``, for Llama-like models of transformers. ``hyperparameters.yaml`` beside it says
      what was adapted.
    - torchtune: ``adapter_<epoch>.pt`` or ``.safetensors``, for Llama-like models of transformers.
      ``adapter_config.json`` beside it says the alpha.

    Args:
        model: The base model, without adapters, or the LightningModule that holds it.
        path: The file. Pickled objects in it are never opened.
        lora_alpha: Of the adapter, which loralib's files do not say; for the others, over what lies beside the file.
        adapter_name: Name to inject it under.

    Returns:
        The same model.

    Raises:
        CheckpointError: If the file is of none of these kinds, or does not fit the model. Nothing is loaded then.
    """
    path = Path(path)
    tensors = _read(path)
    hf_models = list(pretrained_models(model).values())
    root = hf_models[0] if len(hf_models) == 1 else model
    if any(name.endswith(".lora_a.weight") for name in tensors):
        factors, alpha = _from_torchtune(tensors, root, path)
    elif any(name.startswith("transformer.h.") for name in tensors):
        factors, alpha = _from_litgpt(tensors, root, path)
    else:
        factors, alpha = _from_loralib(tensors, root, path), None
    alpha = lora_alpha if lora_alpha is not None else alpha
    if alpha is None:
        raise CheckpointError(f"{path} does not say its alpha: pass lora_alpha as it was trained with.")
    known = modules_by_name(root)
    unknown = [name for name in factors if name not in known]
    if unknown:
        raise CheckpointError(
            f"{path} adapts {unknown[0]!r}, which {type(root).__name__} does not have: load it onto the model that "
            "it was trained on. Nothing was loaded."
        )
    ranks = {name: lora_B.shape[1] for name, (_, lora_B) in factors.items()}
    r = min(ranks.values())
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r},
        target_modules=list(factors),
        modules_to_save=None,
    )
    named = {}
    for name, (lora_A, lora_B) in factors.items():
        is_embedding = isinstance(known[name], nn.Embedding)
        for matrix, tensor in (("A", lora_A), ("B", lora_B)):
            named[f"{name}.lora_embedding_{matrix}" if is_embedding else f"{name}.lora_{matrix}.weight"] = tensor
    return load_tensors(root, config, named, str(path), adapter_name)


def _read(path: Path) -> dict[str, Tensor]:
    with readable(path):
        content: Any = load_file(path) if path.suffix == ".safetensors" else open_file(path, "refuse")
    content = content.get("model", content) if isinstance(content, dict) else {}
    require_type(content, dict[str, Any], str(path))
    require_names(content, str(path))
    found = {name: tensor for name, tensor in content.items() if "lora_" in name.lower()}
    rest = sorted(content.keys() - found.keys())
    if not found or rest:
        raise CheckpointError(
            f"{path} holds {len(found)} tensors of an adapter and {len(rest)} others"
            + (f", among them {rest[0]!r}" if rest else "")
            + ": expected the adapter alone, as lora_state_dict(model), litgpt or torchtune write it."
        )
    odd = [name for name, tensor in found.items() if not (_is_matrix(tensor) and has_own_values(tensor))]
    if odd:
        raise CheckpointError(
            f"{path} is damaged or was made up: {odd[0]!r} is no matrix of numbers. Nothing was loaded."
        )
    return found


def _is_matrix(tensor: Any) -> bool:
    is_plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    return is_plain and tensor.dim() == 2 and tensor.dtype in DTYPES


def _settings_beside(path: Path) -> dict[str, Any]:
    """What a file of settings says, nothing if it is not there."""
    if not path.is_file():
        return {}
    with readable(path):
        text = path.read_text(encoding="utf-8")
        found: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    require_type(found, dict[str, Any], str(path))
    require_type(found.get("lora_alpha"), float | None, str(path), "lora_alpha")
    settings: dict[str, Any] = found
    return settings


def _pairs(tensors: dict[str, Tensor], endings: tuple[str, str], path: Path) -> Factors:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is None:
            raise CheckpointError(f"{path} holds {name!r}, which is neither an A nor a B of an adapter.")
        pairs.setdefault(name.removesuffix(ending), {})[ending] = tensor
    lonely = [name for name, pair in pairs.items() if len(pair) != 2]
    if lonely:
        raise CheckpointError(f"{path} holds one of A and B for {lonely[0]!r}, and not the other: it is cut short.")
    return {name: (pair[endings[0]], pair[endings[1]]) for name, pair in pairs.items()}


def _from_loralib(tensors: dict[str, Tensor], root: nn.Module, path: Path) -> Factors:
    known = modules_by_name(root)
    factors = {}
    for name, (lora_A, lora_B) in _pairs(tensors, (".lora_A", ".lora_B"), path).items():
        if lora_A.shape[0] == lora_B.shape[1]:
            factors[name] = (lora_A, lora_B)
            continue
        rows = qkv_rows(known[name], None) if name in known else None
        if rows is None or lora_A.shape[0] != 2 * lora_B.shape[1] or len(lora_B) != 2 * len(rows["q"]):
            raise CheckpointError(
                f"{path} has an A of shape {tuple(lora_A.shape)} and a B of shape {tuple(lora_B.shape)} for {name!r}: "
                "of MergedLinear, only enable_lora=[True, False, True] can be read, and of convolutions none."
            )
        # The scaling of the whole is that of a part over the number of parts, for which B makes up.
        factors[name] = (lora_A, 2 * in_blocks(lora_B, [rows["q"], rows["v"]], sum(map(len, rows.values()))))
    return factors


def _from_litgpt(tensors: dict[str, Tensor], root: nn.Module, path: Path) -> tuple[Factors, float | None]:
    settings_file = path.parent / "hyperparameters.yaml"
    settings = _settings_beside(settings_file)
    heads, groups, head_dim = _heads(root, path)
    sizes = {"q_proj": heads * head_dim, "k_proj": groups * head_dim, "v_proj": groups * head_dim}
    chosen = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}
    parts = [name for name, setting in chosen.items() if settings.get(setting, name != "k_proj")]
    factors: Factors = {}
    for name, (lora_A, lora_B) in _pairs(tensors, (".lora_A", ".lora_B"), path).items():
        block, inner = _block(name, "transformer.h.")
        if inner in ("attn.qkv", "attn.attn"):
            r = lora_B.shape[1]
            if len(lora_A) != r * len(parts) or len(lora_B) != sum(sizes[part] for part in parts):
                raise CheckpointError(
                    f"{path} has {len(lora_B)} rows in the B of {name!r}, which do not fit {', '.join(parts)}: lay "
                    f"litgpt's hyperparameters.yaml, which says what was adapted, beside the file ({settings_file})."
                )
            split_B = torch.split(lora_B, [sizes[part] for part in parts])
            for part, part_A, part_B in zip(parts, torch.split(lora_A, r), split_B):
                factors[f"model.layers.{block}.self_attn.{part}"] = (part_A, part_B)
        elif name == "lm_head":
            factors[name] = (lora_A, lora_B)
        else:
            factors[_renamed(name, block, inner, _LITGPT, path)] = (lora_A, lora_B)
    return factors, settings.get("lora_alpha")


def _from_torchtune(tensors: dict[str, Tensor], root: nn.Module, path: Path) -> tuple[Factors, float | None]:
    settings = _settings_beside(path.parent / "adapter_config.json")
    queries, groups, _ = _heads(root, path)
    heads = {"q_proj": queries, "k_proj": groups}
    model_type = str(getattr(root.config, "model_type", None))
    factors: Factors = {}
    for name, (lora_A, lora_B) in _pairs(tensors, (".lora_a.weight", ".lora_b.weight"), path).items():
        block, inner = _block(name, "layers.")
        layer = "lm_head" if name == "output" else _renamed(name, block, inner, _TORCHTUNE, path)
        kind = layer.rpartition(".")[2]
        if kind in heads and model_type not in _TURNS_NEIGHBORS:
            raise CheckpointError(
                f"{path} adapts {name!r}, and in which order torchtune has its rows in a {model_type!r} model is not "
                f"known; known are {', '.join(_TURNS_NEIGHBORS)}. Nothing was loaded."
            )
        is_paired = kind in heads and _TURNS_NEIGHBORS[model_type] and len(lora_B) % (2 * heads[kind]) == 0
        factors[layer] = (lora_A, _halves_apart(lora_B, heads[kind]) if is_paired else lora_B)
    return factors, settings.get("lora_alpha")


def _heads(root: nn.Module, path: Path) -> tuple[int, int, int]:
    """How many heads of queries and of keys a model of transformers has, and their size."""
    config: Any = getattr(root, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise CheckpointError(
            f"{path} is for a Llama-like model of transformers, whose config tells its heads, and this is a "
            f"{type(root).__name__} without such a config: load it onto the model that it was trained on. "
            "Nothing was loaded."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _halves_apart(lora_B: Tensor, heads: int) -> Tensor:
    """Rows of B in the order of transformers' rotary embedding, which turns one half of a head against the other.

    Torchtune's turns neighbors in most models, so that its rows of each head come in pairs.
    """
    return lora_B.view(heads, -1, 2, lora_B.shape[1]).transpose(1, 2).reshape(lora_B.shape)


def _block(name: str, prefix: str) -> tuple[str, str]:
    """The index of a block, and the name of a layer in it."""
    index, _, inner = name.removeprefix(prefix).partition(".")
    return index, inner


def _renamed(name: str, block: str, inner: str, names: dict[str, str], path: Path) -> str:
    if inner not in names:
        raise CheckpointError(
            f"{path} adapts {name!r}, whose place in a Llama-like model of transformers is not known; known are "
            f"{', '.join(names)}. Nothing was loaded."
        )
    return f"model.layers.{block}.{names[inner]}"
