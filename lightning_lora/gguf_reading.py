"""GGUF files parsed once, where transformers parses them for the tokenizer, for the config and for the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np


@contextmanager
def parsed_once(gguf_file: str | None) -> Iterator[None]:
    """Within this context, what is found in a GGUF file is remembered; a context within another shares it.

    Args:
        gguf_file: Name of the file; with ``None`` nothing is done.
    """
    # Without the library, transformers says what to install.
    library: Any = import_module("gguf") if gguf_file is not None and find_spec("gguf") else None
    if library is None or hasattr(library.GGUFReader, "cache_info"):
        yield
        return
    reader, names = cache(_of_plain_array(library.GGUFReader)), cache(library.get_tensor_name_map)
    # Which transformers takes from the library at each call.
    with patch.multiple(library, GGUFReader=reader, get_tensor_name_map=names):
        yield


def _of_plain_array(reader: Any) -> Any:
    """A reader that takes a file's parts out of an ordinary array, which is much faster than out of a memmap."""

    class PlainReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, value: Any) -> None:
            self._data = np.asarray(value)

    return PlainReader
