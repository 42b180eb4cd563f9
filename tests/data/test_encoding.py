"""Rows of many records: made in several processes, kept, and found again for the same files and settings alone."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.texts import TEMPLATE, word_checkpoint, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.data import (
    ChatData,
    LabelledTextData,
    PreferenceData,
    SentencePairData,
    Seq2SeqData,
    TaggedWordsData,
    from_files,
)
from lightning_lora.data.cache import cache_name
from lightning_lora.data.encoded import Encoded, Outcome
from lightning_lora.data.encoding import encode_in_folder
from lightning_lora.data.from_files import FileData
from lightning_lora.data.json_rows import ChosenRows, JsonRows, as_json
from lightning_lora.data.packing import Packs, joined
from lightning_lora.data.record import BadRows, Record

LABELS = ["a", "b"]
Make = Callable[..., Any]
KINDS: dict[str, tuple[Make, Callable[[int], dict[str, Any]]]] = {
    "chat": (ChatData, lambda i: {"prompt": f"w{i % 40}", "completion": "w2 " * (i // 40 + 1), "id": i}),
    "preferences": (PreferenceData, lambda i: {"prompt": f"w{i % 40}", "chosen": f"w{i // 40}", "rejected": "w39"}),
    "labels": (LabelledTextData, lambda i: {"text": f"w{i % 40} w{i // 40}", "label": LABELS[i % 2]}),
    "tags": (TaggedWordsData, lambda i: {"tokens": [f"w{i % 40}", f"w{i // 40}"], "tags": ["a", "b"]}),
    "targets": (Seq2SeqData, lambda i: {"source": f"w{i % 40}", "target": f"w{i // 40}"}),
    "sentences": (SentencePairData, lambda i: {"anchor": f"w{i % 40}", "positive": f"w{i // 40}"}),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return word_checkpoint(tmp_path / "model")


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def chats(count: int) -> list[dict[str, Any]]:
    return [KINDS["chat"][1](i) for i in range(count)]


def set_up(make: Make, path: Any, checkpoint: str, **options: Any) -> Any:
    if make in (LabelledTextData, TaggedWordsData):
        options["labels"] = LABELS
    data = make(path, checkpoint, **{"cache_dir": str(Path(checkpoint).parent / "cache"), **options})
    data.setup("fit")
    return data


def kept(checkpoint: str) -> list[Path]:
    return sorted((Path(checkpoint).parent / "cache").glob("*"))


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_those_that_few_would_be(
    kind: str, tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of both sides and what is said of them: in one process, in several, and as they are found again."""
    make, row = KINDS[kind]
    path = write(tmp_path, [*map(row, range(1300)), *map(row, range(5))])
    found = []
    for many in (10**6, 1000, 1000):
        monkeypatch.setattr(from_files, "_MANY", many)
        caplog.clear()
        with caplog.at_level("INFO"):
            data = set_up(make, path, checkpoint)
        said = [message for message in caplog.messages if "encoded before" not in message]
        rows = (data.train_rows[:], data.val_rows[:], data._learned, data.highest_token, data.longest_row)
        found.append((said, *rows))
        assert len(kept(checkpoint)) == (many == 1000)
    assert found[0] == found[1] == found[2] and "encoded before" in caplog.text


def test_what_rows_depend_on_is_never_met_by_older_ones(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_files, "_MANY", 20)
    path = write(tmp_path, chats(30))

    def rows(make: Make = ChatData, **options: Any) -> Any:
        data = set_up(make, path, checkpoint, packing=False, val_fraction=0, **options)
        return data.train_rows[:]

    first = rows()
    assert len(kept(checkpoint)) == 1
    assert rows(batch_size=3, num_workers=1, on_error="skip") == first and len(kept(checkpoint)) == 1
    # As many bytes, and no later than before.
    before = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace('"w7"', '"w9"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    changed = rows()
    assert changed != first and len(kept(checkpoint)) == 2
    assert max(len(row["input_ids"]) for row in rows(max_length=7)) == 7
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<s> {{", "<s> w1 {{")
    tokenizer.save_pretrained(checkpoint)
    assert [row["input_ids"].count(8) for row in rows()] != [row["input_ids"].count(8) for row in changed]

    class Louder(ChatData):
        def encode(self, record: Record) -> Any:
            return super().encode(record._replace(fields={**record.fields, "completion": "w39"}))

    assert all(46 in row["input_ids"] for row in rows(Louder))
    for number, options in enumerate(({"seed": 1}, {"ignore": ["id"]}, {"train_on": "last"}, {"overlong": "reject"})):
        rows(**options)
        assert len(kept(checkpoint)) == 6 + number


def test_the_source_of_a_data_module_belongs_to_what_rows_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "my_data_module.py"
    source.write_text("class Mine: pass")
    kind = importlib.import_module("my_data_module").Mine
    before = cache_name(kind, {}, None, [])
    assert before == cache_name(kind, {}, None, [])
    source.write_text("class Mine: x = 1")
    assert before != cache_name(kind, {}, None, [])


def test_nothing_is_encoded_again(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_files, "_MANY", 20)
    path = write(tmp_path, chats(30))
    first = set_up(ChatData, path, checkpoint)
    monkeypatch.setattr(ChatData, "encode", None)
    again = set_up(ChatData, path, checkpoint)
    assert again.train_rows[:] == first.train_rows[:] and again.val_rows[:] == first.val_rows[:]
    with pytest.raises(TypeError):
        set_up(ChatData, path, checkpoint, max_length=20)


def test_bad_rows_of_many_are_named(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the reader finds and those that cannot be encoded, in all processes, and when rows are found again."""
    monkeypatch.setattr(from_files, "_MANY", 1000)
    rows = chats(1700)
    for bad in (3, 1100, 1600):
        rows[bad]["prompt"] = 7
    path = write(tmp_path, rows)
    with open(path, "a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"Found 4 rows .*\n.*line 4, .*\n.*line 1101.*\n.*line 1601.*\n.*line 1701:"):
        set_up(ChatData, path, checkpoint)
    assert not kept(checkpoint)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"Left out 4 rows .*\n.*line 4, .*\n.*line 1101.*\n.*\n.*line 1701:"):
            set_up(ChatData, path, checkpoint, on_error="skip")
    assert len(kept(checkpoint)) == 1


def test_predictions_of_many_are_of_the_rows_held_out(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, chats(60))
    found = []
    for many in (10**6, 20, 20):
        monkeypatch.setattr(from_files, "_MANY", many)
        data = ChatData(path, checkpoint, cache_dir=str(tmp_path / "cache"))
        data.setup("predict")
        found.append(data.predict_rows)
        data.setup("fit")
        assert len(found[-1]) == len([part for row in data.val_rows for part in data.token_ids(row)]) > 1
    assert found[0] == found[1] == found[2]


def test_a_folder_that_cannot_be_written(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_files, "_MANY", 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: found no way to keep the encoded rows there .*Set data\.cache_dir"):
        set_up(ChatData, write(tmp_path, chats(30)), checkpoint, cache_dir=str(tmp_path / "file"))


def test_a_run_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    def stop(record: Record) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_in_folder([Record("a", {})], stop, BadRows(), tmp_path / "cache" / "x", "a")
    assert not list((tmp_path / "cache").iterdir())
    stale, mine = tmp_path / "cache" / "y.1.part", tmp_path / "cache" / "y.2.part"
    for folder in (stale, mine):
        folder.mkdir()
        (folder / "rows").write_text("")
    for file in (stale / "rows", stale):
        os.utime(file, (0, 0))
    with pytest.raises(KeyboardInterrupt):
        encode_in_folder([Record("a", {})], stop, BadRows(), tmp_path / "cache" / "x", "a")
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["y.2.part"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_lora.data.encoded import Encoded, Outcome
from lightning_lora.data.encoding import encode_in_folder
from lightning_lora.data.record import BadRows, Record

mine = os.getpid()

def encode(record):
    if record.where == "900":
        os.kill(mine, signal.SIGKILL)
    return Outcome(record.where, 0.5, 1.0, Encoded([1]), [])

encode_in_folder((Record(str(i), {}) for i in range(3000)), encode, BadRows(), Path(sys.argv[1]), "rows")
"""


def test_a_run_that_is_killed_leaves_no_rows_and_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "x"
    # Which waits until all that have inherited the outputs have ended.
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [each.suffix for each in folder.parent.iterdir()] == [".part"]
    found = encode_in_folder(
        (Record(str(i), {}) for i in range(3000)),
        lambda record: Outcome(record.where, 0.5, 1.0, Encoded([1]), []),
        BadRows(),
        folder,
        "rows",
    )
    assert len(found) == len(found.rows) == 3000 and found.places[-1] == "2999"
    # Whoever shares the folder can read them, as far as the mode of new files says.
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_a_folder_that_another_run_finishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose name changes while stale ones are looked for; and the faster run's rows are taken."""
    folder = tmp_path / "x"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / f"gone{pattern[1:]}"])

    def encode(record: Record) -> Outcome:
        return Outcome(record.where, 0.5, 1.0, Encoded([1]), [])

    def records() -> Iterator[Record]:
        if not folder.is_dir():
            encode_in_folder([Record("fast", {})], encode, BadRows(), folder, "a")
        yield Record("slow", {})

    assert encode_in_folder(records(), encode, BadRows(), folder, "a").places[:] == ["fast"]


def test_a_subclass_with_settings_of_its_own_is_not_kept(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_files, "_MANY", 20)

    class Own(ChatData):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.change = lambda record: record

    assert len(set_up(Own, write(tmp_path, chats(30)), checkpoint, packing=False, val_fraction=0).train_rows) == 30
    assert not kept(checkpoint)


JSON = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=40)
@given(values=st.lists(JSON, min_size=1), picks=st.lists(st.integers(0, 10**6)))
def test_values_come_back(values: list[Any], picks: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:

    parts = [as_json(value) for value in values]
    ends = np.cumsum([len(part) for part in parts])
    file = tmp_path_factory.mktemp("rows") / "rows"
    file.write_bytes(b"".join(parts))
    indices = np.array([pick % len(values) for pick in picks], int)
    for source in (b"".join(parts), file):
        rows = JsonRows(source, ends)
        assert rows[:] == values and rows[-1] == values[-1] and rows[::-2] == values[::-2]
        chosen = ChosenRows(rows, np.arange(len(values)), indices)
        assert chosen[:] == [values[index] for index in indices] and list(chosen.lengths) == list(indices)
        # As processes that load batches get them.
        assert pickle.loads(pickle.dumps(chosen))[:] == chosen[:]
        with pytest.raises(IndexError):
            rows[len(values)]


def test_packs_are_of_the_rows_with_these_indices() -> None:
    rows = [{"input_ids": [i] * (i + 1), "labels": [-100] + [i] * i} for i in range(3)]
    assert Packs(rows, [[2, 0]])[0] == joined([rows[2], rows[0]])
    assert joined([rows[2], rows[0]])["position_ids"] == [0, 1, 2, 0]


@pytest.mark.parametrize("hub", [True, False])
def test_a_folder_of_parquet(hub: bool, tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files by ``datasets`` or by pyarrow, and found again until one of them changes."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    if hub:
        pytest.importorskip("datasets", reason="needs datasets")
    monkeypatch.setattr(from_files, "_MANY", 20)
    from pyarrow import Table

    folder = tmp_path / "parquet"
    folder.mkdir()
    rows = chats(50)
    for index in (0, 1):
        parquet.write_table(Table.from_pylist(rows[25 * index : 25 * index + 25]), folder / f"train-{index}.parquet")
    path = f"hf:{folder}" if hub else str(folder)
    plain = set_up(ChatData, write(tmp_path, rows), checkpoint, packing=False)
    for count in (2, 2):
        data = set_up(ChatData, path, checkpoint, packing=False)
        assert data.train_rows[:] == plain.train_rows[:] and data.val_rows[:] == plain.val_rows[:]
        assert len(kept(checkpoint)) == count
    blank = [{**row, "prompt": ""} for row in chats(25)]
    parquet.write_table(Table.from_pylist(blank), folder / "train-1.parquet")
    where = r"train row 26" if hub else r"train-1\.parquet, row 1"
    with pytest.raises(ValueError, match=rf"{where}, field 'prompt': found ''"):
        set_up(ChatData, path, checkpoint, packing=False)


def test_a_module_of_ones_own_keeps_nothing() -> None:
    assert FileData("a.jsonl").cache_name("a.jsonl") is None
