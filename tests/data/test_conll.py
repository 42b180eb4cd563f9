"""Words in columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.data.files import read_records

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
# NN I-NP O

Peter NNP B-NP B-PER
"""
UNIVERSAL = """# sent_id = 1
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t0\troot\t_\t_
2\tn't\tnot\tPART\tRB\t_\t1\tadvmod\t_\t_
2.1\tgone\t_\t_\t_\t_\t_\t_\t_\t_
"""


def read(folder: Path, name: str, text: str) -> list[tuple[int, dict[str, list[str]]]]:
    (folder / name).write_text(text)
    found = list(read_records(str(folder / name)))
    return [(int(record.where.rpartition(" ")[2]), record.fields) for record in found]


def test_columns_have_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, "a.conll", CONLL_2003) == [
        (3, {"tokens": ["EU", "#"], "2": ["NNP", "NN"], "3": ["B-NP", "I-NP"], "tags": ["B-ORG", "O"]}),
        (6, {"tokens": ["Peter"], "2": ["NNP"], "3": ["B-NP"], "tags": ["B-PER"]}),
    ]
    assert read(tmp_path, "a.bio", "New York\tB\r\n\r\n\r\nis\tO") == [
        (1, {"tokens": ["New York"], "tags": ["B"]}),
        (4, {"tokens": ["is"], "tags": ["O"]}),
    ]
    assert read(tmp_path, "words.conll", "a\nb\n") == [(1, {"tokens": ["a", "b"]})]


def test_universal_dependencies(tmp_path: Path) -> None:
    ((line, fields),) = read(tmp_path, "a.conllu", UNIVERSAL)
    assert line == 3 and fields["tokens"] == ["Do", "n't"] and fields["tags"] == ["AUX", "PART"]
    assert fields["deprel"] == ["root", "advmod"]


def test_lines_that_lack_a_column(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a\.conll, line 1: found a sentence with 1 columns in the line of 'b', expected 2"
    ):
        read(tmp_path, "a.conll", "a O\nb\n\nc O\n")
