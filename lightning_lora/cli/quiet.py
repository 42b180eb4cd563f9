"""A screen without what a user can do nothing about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

# Of libraries about their own use of others, by how their messages begin.
_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"\s*skip_none parameter was deprecated",
    r"Precision \S+ is not supported by the model summary",
)
_NOTES = ("💡 Tip", "Loading `train_dataloader` to estimate")
_LOGGER = "lightning.pytorch.utilities.rank_zero"


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out some warnings and notes of Lightning, and the bars of transformers, which take no time to speak of."""
    from transformers.utils import logging as transformers_logging

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    def is_of_use(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOTES)

    logger = logging.getLogger(_LOGGER)
    had_bars = transformers_logging.is_progress_bar_enabled()
    # Which transformers 5.24 shows whatever its logging is set to.
    no_bar_of_gguf = patch.object(gguf, "tqdm", partial(gguf.tqdm, disable=True))
    with warnings.catch_warnings(), no_bar_of_gguf:
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        logger.addFilter(is_of_use)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            logger.removeFilter(is_of_use)
            if had_bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
