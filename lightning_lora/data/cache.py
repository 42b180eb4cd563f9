"""Where encoded rows are kept from one run to the next, under a name that all that they depend on gives."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from lightning_lora.version import __version__

_BLOCK = 1 << 20


def cache_name(kind: type, settings: dict[str, Any], tokenizer: Any, files: list[Path]) -> str:
    """A name for the rows that a data module makes of files, which changes with whatever may change them.

    That is every byte of the files, and of what the tokenizer saves, the settings, and the source of the data module
    and of the versions of what it is made with.

    Args:
        kind: The class of the data module.
        settings: Those by which its rows are made, of plain values.
        tokenizer: One of transformers, or ``None``.
        files: The files.
    """
    digest = blake2b(digest_size=16)
    versions = (__version__, transformers.__version__, version("tokenizers"))
    digest.update(json.dumps([kind.__qualname__, versions, settings], sort_keys=True).encode())
    for file in [*_sources(kind), *files]:
        digest.update(_content(file))
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(file.name.encode() + _content(file))
    return digest.hexdigest()


def default_cache() -> Path:
    """``lightning_lora`` in the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_lora")


def _sources(kind: type) -> Iterator[Path]:
    """The files of this package that make rows, and those of classes from outside."""
    yield from sorted(Path(__file__).parent.glob("*.py"))
    modules = [sys.modules.get(each.__module__) for each in kind.__mro__[:-1]]
    own = {file for module in modules if (file := getattr(module, "__file__", None))}
    yield from sorted(Path(file) for file in own if Path(file).is_file())


def _content(file: Path) -> bytes:
    digest = blake2b()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.digest()
