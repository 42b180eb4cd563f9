"""What the directory of a run has to say."""

import dataclasses
from pathlib import Path

from lightning_lora.formats.curves import CURVE_FILE, METRICS_FILE, Curves, read_curves, read_metrics
from lightning_lora.formats.peft_files import CONFIG_FILE
from lightning_lora.formats.run_record import RunRecord, read_record, updates_in
from lightning_lora.formats.saved_adapter import read
from lightning_lora.layers.spectrum import singular_values
from lightning_lora.model.learned import Update

_SETTINGS_FILE = "config.yaml"  # Lightning's command line writes it


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What was found of a run.

    Attributes:
        run_dir: Where.
        record: What it says of itself, if it had a ``Report`` callback.
        curves: What it logged.
        settings: The file of all settings, and what is in it, if it was started by the command line.
        updates: What its adapters have learned.
    """

    run_dir: Path
    record: RunRecord | None
    curves: Curves
    settings: tuple[Path, str] | None
    updates: list[Update]


def read_run(run_dir: Path) -> RunFiles:
    """Read what a run has left in its directory.

    Raises:
        FileNotFoundError: If there is no such directory, or nothing of a run in it.
        CheckpointError: If a file is damaged.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is no directory, expected that of a run, such as runs/quickstart.")
    record, curves, settings = read_record(run_dir), _newest(run_dir, CURVE_FILE), _newest(run_dir, _SETTINGS_FILE)
    metrics, adapter = _newest(run_dir, METRICS_FILE), _newest(run_dir, CONFIG_FILE)
    if record is None and not (curves or metrics or adapter):
        raise FileNotFoundError(
            f"{run_dir} has nothing of a run in it, expected run.json, {CURVE_FILE}, {METRICS_FILE} or an exported "
            "adapter. Name the directory of a run, such as runs/quickstart."
        )
    logged = read_curves(curves) if curves else read_metrics(metrics) if metrics else {}
    return RunFiles(
        run_dir,
        record,
        logged,
        (settings, settings.read_text(encoding="utf-8", errors="replace")) if settings else None,
        updates_in(record) if record is not None else _exported(adapter.parent) if adapter else [],
    )


def _newest(run_dir: Path, name: str) -> Path | None:
    """The newest file of a name, but for links to what is elsewhere, which a page would show to whoever gets it."""
    root = run_dir.resolve()
    found = [path for path in run_dir.rglob(name) if path.is_file() and path.resolve().is_relative_to(root)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _exported(adapter: Path) -> list[Update]:
    """What an adapter in PEFT's format has learned, if it is of products alone; the weights under it are not known."""
    saved = read(adapter)
    config = saved.config()
    if config.kind != "lora" or config.takes_from_base:
        return []
    return [
        Update(layer, len(factors[0]), None, (config.scaling(layer) * singular_values(factors)).tolist())
        for layer, factors in saved.factors().items()
    ]
