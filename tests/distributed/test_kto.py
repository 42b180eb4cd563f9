"""One step of several processes has one reference point of KTO, as TRL takes it."""

import json
from pathlib import Path

import pytest
from helpers.distributed.processes import run_processes
from helpers.texts import word_checkpoint


def test_the_reference_point_is_that_of_all_processes(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    files = []
    for rank, count in enumerate((5, 3)):
        rows = [
            {"prompt": f"w{i + rank}", "completion": f"w{9 + i} w{3 * rank + i}", "label": bool(i % 2)}
            for i in range(count)
        ]
        files.append(str(tmp_path / f"{rank}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = run_processes("kto.one_step", checkpoint, files)
    gained = [*first["gained"], *second["gained"]]
    assert (len(first["gained"]), len(second["gained"])) == (5, 3)
    assert abs(sum(first["gained"]) / 5 - sum(second["gained"]) / 3) > 1e-4
    assert first["mean"] == second["mean"] == pytest.approx(sum(gained) / 8, rel=1e-4)
