"""Stretches of a text that have a label, as tags of its words and back."""

import re
from itertools import pairwise
from typing import Any

from lightning_lora.data.record import Record

Span = tuple[int, int, str]  # from a character, up to before another

FIELDS = ("spans", "entities", "label", "labels")  # of Prodigy, spaCy and doccano
_WORD = re.compile(r"\w+|[^\w\s]")


def spans_in(record: Record, text: str, field: str) -> list[Span]:
    """The spans of a text, in its order, without the blanks at their ends.

    A field holds lists ``[start, end, label]``, or objects with these keys.

    Raises:
        ValueError: If it holds something else, a span is not within the text, is blank, or meets another.
    """
    values = record.fields.get(field)
    if not isinstance(values, list):
        raise record.error(field, "a list of spans such as [0, 5, 'PER']")
    found: list[Span] = []
    for index, value in enumerate(values):
        parts = [value.get(key) for key in ("start", "end", "label")] if isinstance(value, dict) else value
        match parts:
            case [int(start), int(end), str(label)] if 0 <= start < end <= len(text) and not text[start:end].isspace():
                blanks = len(text[start:end]) - len(text[start:end].lstrip())
                found.append((start + blanks, start + len(text[start:end].rstrip()), label))
            case _:
                expected = f"start, end and label of a part of the {len(text)} characters that is not blank"
                raise record.error(f"{field}[{index}]", expected, repr(value))
    found.sort()
    for (_, end, label), (start, _, other) in pairwise(found):
        if start < end:
            raise record.error(field, "spans that do not meet", f"{label!r} and {other!r} at character {start}")
    return found


def words_in(text: str, spans: list[Span]) -> list[tuple[int, int]]:
    """Where the words and signs of a text begin and end; none reaches over the end of a span."""
    borders = {border for start, end, _ in spans for border in (start, end)}
    words = []
    for match in _WORD.finditer(text):
        cuts = [match.start(), *sorted(cut for cut in borders if match.start() < cut < match.end()), match.end()]
        words += list(pairwise(cuts))
    return words


def tags_of(words: list[tuple[int, int]], spans: list[Span], labels: list[str]) -> list[str]:
    """A tag for each word: ``B-`` and ``I-`` of its label where the labels have these, else the label; or ``O``."""
    tags = []
    before: Span | None = None
    for _, end in words:
        span = next((span for span in spans if span[0] < end <= span[1]), None)
        tag = "O" if span is None else f"{'I' if span is before else 'B'}-{span[2]}"
        tags.append(span[2] if span is not None and tag not in labels and span[2] in labels else tag)
        before = span
    return tags


def spans_of(words: list[tuple[int, int]], tags: list[str]) -> list[dict[str, Any]]:
    """The spans that tags of words make, each with ``start``, ``end`` and ``label``."""
    spans: list[dict[str, Any]] = []
    before = "O"
    for (start, end), tag in zip(words, tags):
        kind, _, label = tag.rpartition("-") if tag[:2] in ("B-", "I-") else ("I", "", tag)
        if tag != "O" and kind != "B" and before == label:
            spans[-1]["end"] = end
        elif tag != "O":
            spans.append({"start": start, "end": end, "label": label})
        before = label if tag != "O" else "O"
    return spans
