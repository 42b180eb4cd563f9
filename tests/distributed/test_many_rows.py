"""One of two processes encodes a large file; both learn from what it kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.distributed.processes import end_processes, run_processes
from helpers.texts import word_checkpoint

pytestmark = pytest.mark.slow

ROWS = 1300


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    word_checkpoint(tmp_path / "model")
    rows = [{"prompt": f"w{i % 40}", "completion": "w2 " * (i // 40 + 1)} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_first_process_encodes_for_both_and_for_later_runs(directory: Path) -> None:
    first, second = run_processes("many_rows.fit_twice", str(directory), 1000)
    assert first["encoded"] > 0 == second["encoded"]
    assert first["encoded again"] == second["encoded again"] == 0
    assert len(first["kept"]) == 1 and first["kept"] == second["kept"]
    assert first["rows"] == second["rows"] and all(first["rows"]) and first["steps"] == second["steps"] == 2


def test_a_small_file_is_encoded_once_by_each_to_the_same_rows(directory: Path) -> None:
    few = run_processes("many_rows.fit", str(directory), ROWS + 1)
    assert all(found["encoded"] == ROWS and not found["kept"] for found in few)
    assert few[0]["rows"] == run_processes("many_rows.fit", str(directory), 1000)[1]["rows"]


def test_bad_rows_end_both_processes(directory: Path) -> None:
    with (directory / "rows.jsonl").open("a") as file:
        file.write('{"prompt": 7, "completion": "w1"}\n')
    first, second = end_processes("many_rows.fit", str(directory), 1000, limit=60)
    assert first.returncode not in (0, None) and second.returncode not in (0, None)
    assert "line 1301, field 'prompt': found 7 (int)" in first.output
    assert not list((directory / "cache").glob("*"))
