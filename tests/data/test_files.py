from __future__ import annotations

import builtins
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora.data.files import read_records
from lightning_lora.data.labels import _number
from lightning_lora.data.record import BadRows, Record


def read(path: str | list[str]) -> list[Record]:
    return list(read_records(path))


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    path = folder / name
    path.write_text(text, encoding=encoding)
    return str(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(delimiter=st.sampled_from(",;\t"), inside=st.text(",;\t ", max_size=6))
def test_what_separates_is_told_outside_of_quotes(delimiter: str, inside: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f'"x{inside}"{delimiter}y\n1{delimiter}2\n')
    (record,) = read(path)
    assert record.fields == {f"x{inside}": "1", "y": "2"}


def test_a_header_that_is_no_csv_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '"x"y,z\n1,2\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 1: found no valid CSV .*Correct the header"):
        read(path)


def test_jsonl_names_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\ufeff{"x": 1}\n\n{"x": "é"}\n')
    assert [(record.where, record.fields) for record in read(path)] == [
        (f"{path}, line 1", {"x": 1}),
        (f"{path}, line 3", {"x": "é"}),
    ]


def test_csv_names_the_line_where_a_row_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'x,y\n1,"two\nlines"\n3,"a, b"\n')
    assert [(record.where, record.fields) for record in read(path)] == [
        (f"{path}, line 3", {"x": "1", "y": "two\nlines"}),
        (f"{path}, line 4", {"x": "3", "y": "a, b"}),
    ]


def test_parquet_gives_rows_with_nested_values(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = read(str(tmp_path / "a.parquet"))
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
        read(write(tmp_path, "a.parquet", ""))


ROWS = [{"x": "1", "y": "é"}, {"x": "2", "y": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode("utf-16")),
        ("a.json", LINES.encode()),
        ("a.csv", "x,y\n1,é\n2,b\n".encode()),
        ("a.csv", "x;y\r\n1;é\r\n2;b\r\n".encode("utf-16")),
        ("a.csv.gz", gzip.compress("x,y\n1,é\n2,b\n".encode(), mtime=0)),
        ("a.tsv", "x\ty\n1\té\n2\tb\n".encode()),
    ],
)
def test_kinds_of_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert [record.fields for record in read(str(tmp_path / name))] == ROWS


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    texts = {"a.jsonl.zst": LINES, "b.csv.zst": "x,y\n1,é\n2,b\n", "c.json.zst": json.dumps(ROWS)}
    for name, text in texts.items():
        with pyarrow.output_stream(str(tmp_path / name), compression="zstd") as file:
            file.write(text.encode())
        assert [record.fields for record in read(str(tmp_path / name))] == ROWS
    whole = (tmp_path / "a.jsonl.zst").read_bytes()
    for broken in (whole[:-9], b"x" * 20):
        (tmp_path / "broken.jsonl.zst").write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken\.jsonl\.zst: found no whole zstandard file"):
            read(str(tmp_path / "broken.jsonl.zst"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst: reading \.zst needs pyarrow. Run: pip install"):
        read(str(tmp_path / "a.jsonl.zst"))


def test_files_have_weights(tmp_path: Path) -> None:
    one, other = write(tmp_path, "b.jsonl", '{"x": 1}'), write(tmp_path, "a.csv", "x\n2")
    records = list(read_records({str(tmp_path / "*.jsonl"): 2.5, other: 1}))
    assert [(record.fields["x"], record.weight) for record in records] == [(1, 2.5), ("2", 1)]
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"Found the weight {weight} of .*b\.jsonl', expected a positive number"):
            read_records({one: weight})


def test_arrays_name_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n  {"x": 1},\n\n  {"x": [\n    2]}\n]')
    assert [record.where for record in read(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_several_files(tmp_path: Path) -> None:
    one, other = write(tmp_path, "b.jsonl", '{"x": 1}'), write(tmp_path, "a.csv", "x\n2")
    write(tmp_path, "notes.txt", "no data")
    for path, expected in (([one, other], [1, "2"]), (str(tmp_path), ["2", 1]), (str(tmp_path / "*.jsonl"), [1])):
        assert [record.fields["x"] for record in read(path)] == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Found no file in the folder .*empty.* ends in \.jsonl"):
        read(str(tmp_path / "empty"))


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", "".join(f'{{"x": {i}}}\n{{"x": \n' for i in range(30)))
    with pytest.raises(ValueError, match=r"Found 30 rows that cannot be used") as error:
        read(path)
    assert "line 2:" in str(error.value) and "line 40:" in str(error.value) and "line 42:" not in str(error.value)
    bad = BadRows("skip")
    assert [record.fields["x"] for record in list(read_records(path, bad))] == list(range(30))
    with pytest.warns(UserWarning, match=r"Left out 30 rows that cannot be used"):
        bad.report()


def test_a_data_set_as_the_hub_has_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    write(tmp_path, "train.jsonl", LINES)
    records = read(f"hf:{tmp_path}")
    assert [record.fields for record in records] == ROWS
    assert records[1].where == f"hf:{tmp_path}, train row 2"
    with pytest.raises(ValueError, match=r"expected hf:<id>, hf:<id>:<split>"):
        read("hf:a:b:c:d")
    for path in (f"hf:{tmp_path}:tset", f"hf:{tmp_path}::other"):
        with pytest.raises(ValueError, match=r"^Found path='hf:.*' and no way to such a data set \(.*\), expected one"):
            read(path)


def test_a_data_set_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^Found path='hf:nobody/nothing' and no way .*Offline.*needs a network"):
        read("hf:nobody/nothing")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": ', r"a\.jsonl, line 2: found no valid JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: found a JSON list, expected an object"),
        ("a.jsonl", "\n", "found no rows"),
        ("a.csv", "x,y\n1,2\n1\n", r"a\.csv, line 3: found fewer values than the header's 2 fields \('x', 'y'\)"),
        ("a.csv", "x,y\n1,2,3\n", r"a\.csv, line 2: found more values"),
        ("a.csv", 'x,y\n1,"2\n', r"a\.csv, line 2: found no valid CSV"),
        ("a.jsonl", '{"x": 1, "x": 2}', r"a\.jsonl, line 1: found the field 'x' twice"),
        ("a.jsonl", '{"x": ["\\ud83d"]}', r"a\.jsonl, line 1, field 'x': found half of one \(a lone surrogate\)"),
        ("a.json", '[{"x": 1},\n{"x": ]', r"a\.json, line 2: found no valid JSON in the row that begins here"),
        ("a.json", '[{"x": 1}]\n[{"x": 2}]', r"a\.json, line 1: found more behind the array that ends here"),
        ("a.tsv", 'x\ty\n"1\ta\n2"\tb\n', r"a\.tsv, line 3: found a quote that holds tabs and line breaks"),
        ("a.json", "[1]", r"a\.json, line 1: found a JSON int, expected an object"),
        ("a.csv", "x,x\n1,2\n", r"a\.csv, line 1: found the header 'x', 'x', expected each field's name once"),
        ("a.jsonl.gz", "x", r"a\.jsonl\.gz: found no whole gzip file"),
        ("a.parquet", "x", r"a\.parquet: found no valid Parquet"),
        ("a.txt", "x", r"expected a name that ends in \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="needs pyarrow")
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, text))


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found bytes that are not UTF-8"):
        read(write(tmp_path, "a.jsonl", '{"x": "é"}', encoding="latin-1"))


@pytest.mark.parametrize("path", ["absent.jsonl", "shipped:absent.jsonl"])
def test_missing_files(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        read(path)


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read("shipped:devils_dictionary.jsonl")) == 554


@given(
    depth=st.integers(2000, 50_000), opened=st.sampled_from(["[", '{"a":']), name=st.sampled_from(["a.jsonl", "a.json"])
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_rows_of_any_depth_are_named(tmp_path: Path, depth: int, opened: str, name: str) -> None:
    for start in ("", "[") if name == "a.json" else ("",):
        (tmp_path / name).write_text(start + '{"a": ' + opened * depth)
        with pytest.raises(ValueError, match=rf"{name}, line 1: .*no valid JSON"):
            list(read_records(str(tmp_path / name)))


@given(digits=st.integers(310, 4000))
def test_a_number_that_no_float_holds_is_no_number(digits: int) -> None:
    assert _number(int("9" * digits)) is None
