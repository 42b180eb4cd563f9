"""Data sets of the hub, read by ``datasets`` from a stand-in of the hub's server, then without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import running

pytest.importorskip("datasets", reason="needs datasets")

READ = """
import json, sys
from lightning_lora.data.files import read_records
for path in sys.argv[1:]:
    try:
        print(json.dumps([[record.where, record.fields] for record in read_records(path)]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train-*.jsonl}
  - {split: test, path: test.jsonl}
- config_name: other
  data_files: other.jsonl
- config_name: broken
  data_files: broken.jsonl
---
"""


def lines(count: int, **more: Any) -> bytes:
    return "".join(json.dumps({"prompt": f"w{i}", "completion": "w1", **more}) + "\n" for i in range(count)).encode()


def read(cache: Path, environment: dict[str, str], *paths: str) -> list[Any]:
    """What is found under each path, in a process of its own, for the hub's address is read once."""
    ended = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.slow
def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    with running() as hub:
        hub.datasets["me/rows"] = {
            "README.md": CARD.encode(),
            "train-0.jsonl": lines(2, id=7),
            "train-1.jsonl": lines(1),
            "test.jsonl": lines(1),
            "other.jsonl": lines(2),
            "broken.jsonl": b"prompt,completion\n",
        }
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        paths = ("hf:me/rows", "hf:me/rows:test", "hf:me/rows:train:other")
        wrong = ("hf:me/rows:dev", "hf:me/rows:train:broken", "hf:me/nothing")
        found = read(tmp_path, online, *paths, *wrong)
    train, test, other, no_split, broken, nothing = found
    pairs = [("w0", 7), ("w1", 7), ("w0", None)]  # a field that a file lacks is empty
    assert train == [
        [f"hf:me/rows, train row {row}", {"prompt": prompt, "completion": "w1", "id": number}]
        for row, (prompt, number) in enumerate(pairs, start=1)
    ]
    assert [where for where, _ in test] == ["hf:me/rows:test, test row 1"] and test[0][1]["prompt"] == "w0"
    assert [fields for _, fields in other] == [{"prompt": f"w{i}", "completion": "w1"} for i in (0, 1)]
    assert no_split.startswith("Found path='hf:me/rows:dev'") and "'train', 'test'" in no_split
    assert "no way to such a data set (JSON" in broken
    assert nothing.startswith("Found path='hf:me/nothing' and no way to such a data set (404")
    offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    again = read(tmp_path, offline, "hf:me/rows:train:default", paths[2])
    assert [[fields for _, fields in rows] for rows in again] == [
        [fields for _, fields in rows] for rows in (train, other)
    ]
