"""A saved adapter put back on its base model, by names of files alone."""

import json
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
    name, gguf_file = _named(saved, base, gguf_file)
    quantize = None if unquantized else _quantize_as(saved)
    model = load_base(name, gguf_file, dtype, quantize)
    if saved.path.is_dir():
        load_adapter(model, saved.path, other_format=unquantized)
        return model
    holder = _Holder()
    _put(holder, _prefix(saved, model), model)
    load_adapter(holder, saved.path, other_format=unquantized)
    return holder


def _named(saved: SavedAdapter, base: str | None, gguf_file: str | None) -> tuple[str, str | None]:
    """The base model and the GGUF file in it, as they are given, or else as the adapter names them."""
    hyper = {} if saved.path.is_dir() else read_checkpoint(saved.path).get("hyper_parameters", {})
    hyper = {name: value for name, value in hyper.items() if isinstance(value, str)} if isinstance(hyper, dict) else {}
    name = base or saved.settings.get("base_model_name_or_path") or hyper.get("pretrained")
    if not name:
        raise CheckpointError(f"{saved.path} does not say what its base model is: name it with --base.")
    return str(name), gguf_file or (None if base else hyper.get("gguf_file"))


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
    """Load a model of transformers, or one of diffusers from a directory, by the class that its config names.

    Args:
        name: A hub id or a directory.
        gguf_file: The file in it, if it is a GGUF file.
        dtype: Type of the weights; ``"auto"`` is the model's own.
        quantize: What to quantize it to, by the name that the recipes have for it.
    """
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


def _put(holder: nn.Module, name: str, model: nn.Module) -> None:
    *owners, last = (name or "model").split(".")
    for owner in owners:
        holder.add_module(owner, _Holder())
        holder = holder.get_submodule(owner)
    holder.add_module(last, model)


def tokenizer_of(saved: SavedAdapter, base: str | None, gguf_file: str | None = None) -> Any | None:
    """The tokenizer that lies with the adapter or with its base, if there is one."""
    from transformers import AutoTokenizer

    from lightning_lora.pretrained import load_tokenizer, resolve

    name, gguf_file = _named(saved, base, gguf_file)
    place = resolve(name)
    for folder in [saved.path, Path(place)]:
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder)
    if gguf_file is not None:
        return load_tokenizer(name, gguf_file)
    if Path(place).exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError):  # the hub has none of it
        return None


def gguf_tokenizer_of(saved: SavedAdapter, base: str | None, gguf_file: str | None = None) -> Any:
    """What the tokenizer of a GGUF file is made of: the GGUF file that the base is, or a tokenizer.

    Raises:
        CheckpointError: If there is neither.
    """
    name, _ = _named(saved, base, gguf_file)
    place = local_base(saved, base, gguf_file)
    if place is not None and place.is_file():
        return place
    tokenizer = tokenizer_of(saved, base)
    if tokenizer is None:
        raise CheckpointError(f"A GGUF file holds a tokenizer too, and there is none with {saved.path} or {name}.")
    return tokenizer


def local_base(saved: SavedAdapter, base: str | None, gguf_file: str | None = None) -> Path | None:
    """The base on this machine: its GGUF file, or its directory, ``None`` where a hub's id names it alone."""
    from transformers.utils.hub import cached_file

    from lightning_lora.pretrained import resolve

    name, gguf_file = _named(saved, base, gguf_file)
    if gguf_file is not None:
        return Path(str(cached_file(resolve(name), gguf_file))).absolute()
    place = Path(resolve(name)).absolute()
    return place if place.is_dir() else None
