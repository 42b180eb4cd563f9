from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.data.files import read_records


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    path = folder / name
    path.write_text(text, encoding=encoding)
    return str(path)


def test_jsonl_names_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\ufeff{"x": 1}\n\n{"x": "é"}\n')
    assert [(record.where, record.fields) for record in read_records(path)] == [
        (f"{path}, line 1", {"x": 1}),
        (f"{path}, line 3", {"x": "é"}),
    ]


def test_csv_names_the_line_where_a_row_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'x,y\n1,"two\nlines"\n3,"a, b"\n')
    assert [(record.where, record.fields) for record in read_records(path)] == [
        (f"{path}, line 3", {"x": "1", "y": "two\nlines"}),
        (f"{path}, line 4", {"x": "3", "y": "a, b"}),
    ]


def test_parquet_gives_rows_with_nested_values(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = read_records(str(tmp_path / "a.parquet"))
    assert [record.fields for record in records] == rows
    assert records[1].where.endswith("a.parquet, row 2")


def test_parquet_without_pyarrow_gives_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ImportError, match="Run: pip install pyarrow"):
        read_records(write(tmp_path, "a.parquet", ""))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": ', r"a\.jsonl, line 2: found no valid JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: found a JSON list, expected an object"),
        ("a.jsonl", "\n", "found no rows"),
        ("a.csv", "x,y\n1,2\n1\n", r"a\.csv, line 3: found fewer values than the header's 2 fields \('x', 'y'\)"),
        ("a.csv", "x,y\n1,2,3\n", r"a\.csv, line 2: found more values"),
        ("a.csv", 'x,y\n1,"2\n', r"a\.csv, line 2: found no valid CSV"),
        ("a.txt", "x", r"expected a name that ends in \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path, name, text))


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found bytes that are not UTF-8"):
        read_records(write(tmp_path, "a.jsonl", '{"x": "é"}', encoding="latin-1"))


@pytest.mark.parametrize("path", ["absent.jsonl", "shipped:absent.jsonl"])
def test_missing_files(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        read_records(path)


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read_records("shipped:devils_dictionary.jsonl")) == 554
