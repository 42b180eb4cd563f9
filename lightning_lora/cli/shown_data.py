"""``lightning-lora data``: what a run would learn, before it does."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_lora.data.from_files import FileData
from lightning_lora.data.lengths import lengths_of

_WIDTH = 40
_TEXTS = 2  # that are shown of a row


def show(data: FileData, rows: int) -> None:
    """Print counts, lengths, and so many rows, at even distances, of a data module that is set up.

    What is learned in them is green, and in «» where there are no colors.
    """
    console = Console(highlight=False)
    parts: dict[str, Sequence[Any]] = {"training": data.train_rows or [], "validation": data.val_rows}
    for purpose, part in parts.items():
        _lengths(console, data, purpose, part)
    part = parts["training"]
    for row in part[:: max(1, len(part) // max(1, rows))][:rows]:
        console.rule()
        texts = list(zip(data.token_ids(row), data.learned(row)))
        for ids, learned in texts[:_TEXTS]:
            console.print(_text(data, ids, learned, console.is_terminal), soft_wrap=True)
        if len(texts) > _TEXTS:
            console.print(f"... and {len(texts) - _TEXTS} more texts in this row")
        if (label := data.label(row)) is not None:
            console.print(_marked(label, console.is_terminal), soft_wrap=True)


def _lengths(console: Console, data: FileData, purpose: str, rows: Sequence[Any]) -> None:
    """A histogram of the lengths, and how much is learned."""
    found = lengths_of(data, rows)
    if found is None:
        return
    share = f", {found.learned:,} of them learned ({found.learned / found.tokens:.0%})" if found.learned else ""
    console.print(f"{purpose}: {found.texts:,} texts, {found.tokens:,} tokens{share}")
    table = Table("tokens", "texts", "", box=None, padding=(0, 1))
    for index, count in enumerate(found.counts):
        bar = "█" * -(-count * _WIDTH // max(found.counts))
        start = found.first + index * found.step
        table.add_row(str(start) if found.step == 1 else f"{start}-{start + found.step - 1}", f"{count:,}", bar)
    console.print(table)


def _text(data: Any, ids: list[int], learned: list[bool], colors: bool) -> Text:
    text, before, end = Text(), "", 0
    for on, group in groupby(learned):
        end += len(list(group))
        # From the beginning, since tokens have spaces between them that depend on those before.
        whole = data.tokenizer.decode(ids[:end])
        said, before = whole[len(before) :], whole
        text += _marked(said, colors) if on else Text(said)
    return text


def _marked(text: str, colors: bool) -> Text:
    return Text(text, "bold green") if colors else Text(f"«{text}»")
