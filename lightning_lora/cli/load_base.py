"""A saved adapter put back on its base model, by names of files alone."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_lora.formats.checkpoint import read_checkpoint
from lightning_lora.formats.peft import load_adapter
from lightning_lora.formats.saved_adapter import SavedAdapter
from lightning_lora.fqn import clean_fqn
from lightning_lora.model.quantization import described
from lightning_lora.model.state_dict import CheckpointError


class Base(NamedTuple):
    """A base model: a hub id or a directory, and the GGUF file in it, if it is one."""

    name: str
    gguf_file: str | None


def base_of(saved: SavedAdapter, base: str | None, gguf_file: str | None) -> Base:
    """The base model of an adapter and the GGUF file in it, as they are given, or else as the adapter names them.

    Raises:
        CheckpointError: If neither says what it is.
    """
    hyper = {} if saved.path.is_dir() else read_checkpoint(saved.path).get("hyper_parameters", {})
    hyper = {name: value for name, value in hyper.items() if isinstance(value, str)} if isinstance(hyper, dict) else {}
    name = base or saved.settings.get("base_model_name_or_path") or hyper.get("pretrained")
    if not name:
        raise CheckpointError(f"{saved.path} does not say what its base model is: name it with --base.")
    return Base(str(name), gguf_file or (None if base else hyper.get("gguf_file")))


def open_on_base(
    saved: SavedAdapter, base: Base, dtype: str | torch.dtype = "auto", unquantized: bool = False
) -> nn.Module:
    """Load a base model, in its own type unless another is given, and put a saved adapter on it.

    The base is quantized as that was which the adapter was trained on, unless it is to be left in full precision.

    Returns:
        The adapted model, or what holds it as the LightningModule of a checkpoint did.

    Raises:
        CheckpointError: If the adapter does not fit the base.
    """
    model = load_base(*base, dtype, None if unquantized else _quantize_as(saved))
    if not saved.path.is_dir():
        for part in reversed((_prefix(saved, model) or "model").split(".")):
            holder = nn.Module()
            holder.add_module(part, model)
            model = holder
    load_adapter(model, saved.path, other_format=unquantized)
    return model


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
    """Load a model of transformers, or one of diffusers from a directory, by the class that its config names."""
    diffusion = _diffusion_class(name)
    if diffusion is not None:
        loaded: nn.Module = diffusion.from_pretrained(name, torch_dtype=None if isinstance(dtype, str) else dtype)
        return loaded
    import transformers

    from lightning_lora.pretrained import load_causal_lm, quantization_config, resolve

    if gguf_file is not None:
        return load_causal_lm(name, gguf_file, torch.float32 if isinstance(dtype, str) else dtype, quantize)
    config = transformers.AutoConfig.from_pretrained(resolve(name))
    known = [each for each in config.architectures or [] if hasattr(transformers, each)]
    kind: Any = _model_class(transformers, known[0], transformers.PreTrainedModel) if known else transformers.AutoModel
    options = {}
    if quantize is not None and getattr(config, "quantization_config", None) is None:
        its_own = config.dtype or torch.float32 if isinstance(dtype, str) else dtype
        options["quantization_config"] = quantization_config(quantize, its_own)
    model: nn.Module = kind.from_pretrained(resolve(name), dtype=dtype, **options)
    return model


def _diffusion_class(name: str) -> Any | None:
    """The class of diffusers that the config in a directory names, ``None`` if it names none."""
    path = Path(name) / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "_diffusers_version" not in settings:
        return None
    import diffusers

    return _model_class(diffusers, settings.get("_class_name"), diffusers.ModelMixin)


def _model_class(library: Any, name: Any, kind: type) -> Any:
    """The class that a file names, which is to be a model's and nothing else that a library has."""
    found = getattr(library, str(name), None)
    if not isinstance(found, type) or not issubclass(found, kind):
        raise CheckpointError(
            f"The base's config.json names {str(name)[:80]!r} as its class, which is no model of {library.__name__}: "
            "take another copy of it, or update the library. Nothing was loaded."
        )
    return found


def _prefix(saved: SavedAdapter, model: nn.Module) -> str:
    """The name of the transformers model in the LightningModule."""
    modules = {clean_fqn(name) for name, _ in model.named_modules()}
    layer = next((name.partition(".lora.")[0] for name in saved.tensors if ".lora." in name), "")
    parts = layer.split(".")
    for start in range(len(parts)):
        if ".".join(parts[start:]) in modules:
            return ".".join(parts[:start])
    raise CheckpointError(
        f"{saved.path} adapts {layer!r}, and {type(model).__name__} has no such layer: it was trained on another "
        "model, so name the right one with --base."
    )


def tokenizer_of(saved: SavedAdapter, base: Base) -> Any | None:
    """The tokenizer that lies with the adapter or with its base, if there is one."""
    from transformers import AutoTokenizer

    from lightning_lora.pretrained import load_tokenizer, resolve

    place = Path(resolve(base.name))
    for folder in (saved.path, place):
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder)
    if base.gguf_file is not None:
        return load_tokenizer(*base)
    if place.exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(base.name)
    except (OSError, ValueError):  # the hub has none of it
        return None


def gguf_tokenizer_of(saved: SavedAdapter, base: Base) -> Any:
    """What the tokenizer of a GGUF file is made of: the GGUF file that the base is, or a tokenizer.

    Raises:
        CheckpointError: If there is neither.
    """
    place = local_base(base)
    if place is not None and place.is_file():
        return place
    tokenizer = tokenizer_of(saved, base)
    if tokenizer is None:
        raise CheckpointError(f"A GGUF file holds a tokenizer too, and there is none with {saved.path} or {base.name}.")
    return tokenizer


def local_base(base: Base) -> Path | None:
    """The base on this machine: its GGUF file, or its directory, ``None`` where a hub's id names it alone."""
    from transformers.utils.hub import cached_file

    from lightning_lora.pretrained import resolve

    place = resolve(base.name)
    if base.gguf_file is not None:
        return Path(str(cached_file(place, base.gguf_file))).absolute()
    return Path(place).absolute() if Path(place).is_dir() else None
