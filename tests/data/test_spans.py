"""Spans as tags of words, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.data.record import Record
from lightning_lora.data.spans import Span, spans_in, spans_of, tags_of, words_in

TEXT = "Ann Lee's dog, in New York."
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.mark.parametrize(
    "spans",
    [
        [[0, 7, "PER"], [18, 26, "LOC"]],
        [{"start": 18, "end": 26, "label": "LOC", "id": 1}, {"start": 0, "end": 7, "label": "PER"}],
        [[17, 26, "LOC"], [0, 7, "PER"]],
    ],
)
def test_words_have_tags(spans: list[Any]) -> None:
    found = spans_in(Record("here", {"spans": spans}), TEXT, "spans")
    words = words_in(TEXT, found)
    assert [TEXT[start:end] for start, end in words] == ["Ann", "Lee", "'", "s", "dog", ",", "in", "New", "York", "."]
    assert tags_of(words, found, LABELS) == ["B-PER", "I-PER", "O", "O", "O", "O", "O", "B-LOC", "I-LOC", "O"]
    assert tags_of(words, found, ["O", "PER", "LOC"]) == ["PER", "PER", "O", "O", "O", "O", "O", "LOC", "LOC", "O"]


def test_words_end_where_a_span_does() -> None:
    words = words_in("unhappy", [(2, 7, "X")])
    assert words == [(0, 2), (2, 7)] and tags_of(words, [(2, 7, "X")], []) == ["O", "B-X"]


@given(text=st.text("ab. é\n", max_size=20), data=st.data())
def test_there_and_back(text: str, data: st.DataObject) -> None:
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans: list[Span] = []
    for start, end in zip(borders[::2], borders[1::2]):
        part = text[start:end]
        if part.strip():
            start += len(part) - len(part.lstrip())
            spans.append((start, start + len(part.strip()), data.draw(st.sampled_from("XY"))))
    words = words_in(text, spans)
    tags = tags_of(words, spans, [])
    assert [(span["start"], span["end"], span["label"]) for span in spans_of(words, tags)] == spans


def test_tags_without_beginnings() -> None:
    words = [(0, 1), (2, 3), (4, 5), (6, 7)]
    found = [(span["start"], span["end"], span["label"]) for span in spans_of(words, ["X", "X", "I-Y", "B-Y"])]
    assert found == [(0, 3, "X"), (4, 5, "Y"), (6, 7, "Y")]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (
            [[0, 99, "X"]],
            r"field 'spans\[0\]': found \[0, 99, 'X'\], expected start, end and label of a part of the 27",
        ),
        ([[3, 4, "X"]], r"field 'spans\[0\]'"),
        ([[3, 3, "X"]], r"field 'spans\[0\]'"),
        ([["0", 3, "X"]], r"field 'spans\[0\]'"),
        ([{"start": 0, "end": 3}], r"field 'spans\[0\]'"),
        (
            [[0, 7, "PER"], [4, 9, "X"]],
            r"field 'spans': found 'PER' and 'X' at character 4, expected spans that do not",
        ),
        ("PER", r"field 'spans': found 'PER' \(str\), expected a list of spans"),
    ],
)
def test_bad_spans(spans: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spans_in(Record("here", {"spans": spans}), TEXT, "spans")
