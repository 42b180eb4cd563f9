"""A saved adapter put back on its base model, by names of files alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.formats.checkpoint import read_checkpoint
from lightning_lora.formats.peft import load_adapter
from lightning_lora.formats.saved_adapter import SavedAdapter
from lightning_lora.fqn import clean_fqn
from lightning_lora.model.quantization import described
from lightning_lora.model.state_dict import CheckpointError


class _Holder(nn.Module):
    """Holds a model under the name that it has in the LightningModule that a checkpoint was saved from."""


def open_on_base(
    saved: SavedAdapter,
    base: str | None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    unquantized: bool = False,
) -> nn.Module:
    """Load a base model of transformers and put a saved adapter on it.

    The base is quantized as that was which the adapter was trained on.

    Args:
        saved: What was read of the adapter.
        base: A hub id or a directory; ``None`` takes what the adapter names as its base.
        gguf_file: Name of the GGUF file in ``base``, if it is one; a checkpoint of a recipe names its own.
        dtype: Type of the weights; ``"auto"`` is that of the base.
        unquantized: Whether to leave the base in full precision all the same.

    Returns:
        The adapted model, or what holds it as the LightningModule of a checkpoint did.

    Raises:
        CheckpointError: If the base is not known, or the adapter does not fit it.
    """
    hyper = {} if saved.path.is_dir() else read_checkpoint(saved.path).get("hyper_parameters", {})
    hyper = {name: value for name, value in hyper.items() if isinstance(value, str)} if isinstance(hyper, dict) else {}
    name = base or saved.settings.get("base_model_name_or_path") or hyper.get("pretrained")
    if not name:
        raise CheckpointError(f"{saved.path} does not say what its base model is: name it with --base.")
    quantize = None if unquantized else _quantize_as(saved)
    model = load_base(str(name), gguf_file or (None if base else hyper.get("gguf_file")), dtype, quantize)
    if saved.path.is_dir():
        load_adapter(model, saved.path, other_format=unquantized)
        return model
    holder = _Holder()
    _put(holder, _prefix(saved, model), model)
    load_adapter(holder, saved.path, other_format=unquantized)
    return holder


def _quantize_as(saved: SavedAdapter) -> str | None:
    """The name of the quantization that a base had, as the recipes call it."""
    if not saved.quantization:
        return None
    record = saved.quantization[0]
    name = (
        "int8" if record.get("bits") == 8 else record.get("quant_type", "") + "-dq" * record.get("double_quant", False)
    )
    is_known = len(saved.quantization) == 1 and record.get("library") == "bitsandbytes"
    if not is_known or record.get("block_size", 64) != 64:
        raise CheckpointError(
            f"{saved.path} was trained on a base that was {described(saved.quantization)}, which this command cannot "
            "make again: quantize the base in Python, then load_adapter(model, ...) and save_merged, or merge onto the "
            "original by --onto original."
        )
    return name


def load_base(name: str, gguf_file: str | None, dtype: str | torch.dtype, quantize: str | None) -> nn.Module:
    """Load a model of transformers by the class that its config names.

    Args:
        name: A hub id or a directory.
        gguf_file: The file in it, if it is a GGUF file.
        dtype: Type of the weights; ``"auto"`` is the model's own.
        quantize: What to quantize it to, by the name that the recipes have for it.
    """
    import transformers

    from lightning_lora.pretrained import load_causal_lm, quantization_config, resolve

    if gguf_file is not None:
        return load_causal_lm(name, gguf_file, torch.float32 if isinstance(dtype, str) else dtype, quantize)
    config = transformers.AutoConfig.from_pretrained(resolve(name))
    architectures = [cls for cls in (config.architectures or []) if hasattr(transformers, cls)]
    kind = getattr(transformers, architectures[0]) if architectures else transformers.AutoModel
    options = {}
    if quantize is not None and getattr(config, "quantization_config", None) is None:
        its_own = config.dtype or torch.float32 if isinstance(dtype, str) else dtype
        options["quantization_config"] = quantization_config(quantize, its_own)
    model: nn.Module = kind.from_pretrained(resolve(name), dtype=dtype, **options)
    return model


def _prefix(saved: SavedAdapter, model: nn.Module) -> str:
    """The name of the transformers model in the LightningModule."""
    modules = {clean_fqn(name) for name, _ in model.named_modules()}
    layer = next(iter(saved.factors()), "")
    parts = layer.split(".")
    for start in range(len(parts)):
        if ".".join(parts[start:]) in modules:
            return ".".join(parts[:start])
    raise CheckpointError(
        f"{saved.path} adapts {layer!r}, and {type(model).__name__} has no such layer: it was trained on another "
        "model, so name the right one with --base."
    )


def _put(holder: nn.Module, name: str, model: nn.Module) -> None:
    *owners, last = (name or "model").split(".")
    for owner in owners:
        holder.add_module(owner, _Holder())
        holder = holder.get_submodule(owner)
    holder.add_module(last, model)


def tokenizer_of(saved: SavedAdapter, base: str | None) -> Any | None:
    """The tokenizer that lies with the adapter or with its base, if there is one."""
    from transformers import AutoTokenizer

    from lightning_lora.pretrained import resolve

    places = [saved.path] if saved.path.is_dir() else []
    name = base or saved.settings.get("base_model_name_or_path")
    for place in [*places, *([Path(resolve(name))] if name else [])]:
        if (place / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(place)
    return None
