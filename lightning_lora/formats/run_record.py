"""``run.json``: what a run knows of itself and no other file of it says, for its report."""

import json
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from lightning_lora.formats.publish import write_text
from lightning_lora.formats.schema import require_type
from lightning_lora.model.learned import Update
from lightning_lora.model.state_dict import CheckpointError

RECORD_FILE = "run.json"
_LONGEST = 1e10  # seconds of a run


class Histogram(TypedDict):
    """See :class:`~lightning_lora.data.lengths.Lengths`."""

    texts: int
    tokens: int
    learned: int
    first: int
    step: int
    counts: list[int]


class Rows(TypedDict):
    """Of one split of the data, what it is for, its rows, and the lengths of their texts, if it has such."""

    purpose: str
    rows: int
    lengths: Histogram | None


class Sample(TypedDict):
    """What the model said, before and after."""

    prompt: str
    before: str | None
    after: str | None


class Output(TypedDict):
    """What was written, or is in memory."""

    name: str
    path: str
    bytes: int


class LearnedUpdate(TypedDict):
    """See :class:`~lightning_lora.model.learned.Update`."""

    layer: str
    r: int
    weight_norm: float | None
    values: list[float]


class RunRecord(TypedDict):
    """What a run was.

    Attributes:
        command: What started it.
        seconds: How long training took.
        versions: Of packages, by name, and of the machine.
        settings: By part of the run, such as ``"adapter"``, its settings.
        before: Validation metrics before training, none if they were not measured on all rows.
        after: Those of the last validation.
    """

    command: str
    seconds: float
    versions: dict[str, str]
    settings: dict[str, dict[str, Any]]
    data: list[Rows]
    before: dict[str, float]
    after: dict[str, float]
    samples: list[Sample]
    outputs: list[Output]
    updates: list[LearnedUpdate]


def write_record(record: RunRecord, run_dir: Path) -> None:
    """Write it, whole or not at all."""
    write_text(json.dumps(record, indent=1) + "\n", run_dir / RECORD_FILE)


def read_record(run_dir: Path) -> RunRecord | None:
    """The record in a run's directory, ``None`` if there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = run_dir / RECORD_FILE
    if not path.is_file():
        return None
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    require_type(found, RunRecord, str(path))
    record: RunRecord = found
    _require_countable(record, str(path))
    return record


def _require_countable(record: RunRecord, source: str) -> None:
    histograms = [rows["lengths"] for rows in record["data"] if rows["lengths"] is not None]
    countable = 0 <= record["seconds"] < _LONGEST and all(each["texts"] > 0 for each in histograms)
    if not countable or not all(update["values"] for update in record["updates"]):
        raise CheckpointError(
            f"{source} is damaged or was made up: its seconds, its numbers of texts or its singular values are none. "
            "Take another copy of it."
        )


def updates_in(record: RunRecord) -> list[Update]:
    """What the adapters had learned."""
    return [Update(*map(update.__getitem__, Update._fields)) for update in record["updates"]]  # type: ignore[arg-type]
