"""``Report``: one page that says whether a fit worked, why, and what to try next."""

import platform
import shlex
import sys
import time
from collections.abc import Sized
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.callbacks.before_after import BeforeAfter
from lightning_lora.callbacks.logged_files import log_file
from lightning_lora.callbacks.outputs import file_bytes, outputs, weight_bytes
from lightning_lora.data.from_files import FileData
from lightning_lora.data.lengths import lengths_of
from lightning_lora.formats.run_record import Rows, RunRecord, write_record
from lightning_lora.model.learned import updates_of
from lightning_lora.model.record import named_injections
from lightning_lora.plain import plain
from lightning_lora.run_report import write_report
from lightning_lora.version import __version__

_PACKAGES = ("torch", "lightning", "transformers")
_DATA_SETTINGS = ("path", "val_path", "val_fraction", "batch_size", "max_length", "seed")


class Report(Callback):
    """Write ``report.html`` when a fit ends: one file that opens in any browser, without a server or a network.

    It shows metrics from before and after (set the trainer's ``num_sanity_val_steps`` to -1, so that the sanity check
    covers the whole validation set), what ``LearningCurve``, ``BeforeAfter`` and ``Throughput`` have found where they
    are in the Trainer, before it in the list, the update of each layer with its singular values, the data, sizes,
    settings and versions, and what to try next. What no other file of the run says is in ``run.json`` beside it, from
    which ``lightning-lora report`` makes the page again. The page needs plotly; without it, ``run.json`` is written.
    The loggers of MLflow and W&B get the page too.

    Args:
        run_dir: The directory of the run, below which the others of its files are, such as ``runs/quickstart``.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        self._record: RunRecord | None = None
        self._before: dict[str, float] = {}

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record what the model does before training."""
        if trainer.num_sanity_val_batches == trainer.num_val_batches:
            self._before = _metrics(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the adapters before they are merged; every process takes part."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        after = {name: value for name, value in _metrics(trainer).items() if name in self._before or "val" in name}
        updates: Any = [update._asdict() for update in updates_of(pl_module)]
        self._record = {
            "command": command(),
            "seconds": time.perf_counter() - self._start,
            "versions": _versions(pl_module),
            "settings": _settings(trainer, pl_module),
            "data": _data(trainer),
            "before": self._before,
            "after": after,
            "samples": [],
            "outputs": [{"name": "all weights in memory", "path": "", "bytes": weight_bytes(pl_module)}],
            "updates": updates,
        }

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the files, after every callback has finished its own in ``on_fit_end``."""
        record, self._record = self._record, None
        if record is None or not trainer.is_global_zero:
            return
        record["samples"] = [
            {"prompt": each.prompt, "before": each.sample_before, "after": each.sample_after}
            for each in trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            if isinstance(each, BeforeAfter)
        ]
        record["outputs"] += [
            {"name": name, "path": str(path), "bytes": file_bytes(path)} for name, path in outputs(trainer)
        ]
        write_record(record, self.run_dir)
        try:
            written = write_report(self.run_dir)
        except ModuleNotFoundError as error:
            rank_zero_info(str(error))
        else:
            log_file(trainer, written)
            rank_zero_info(f"What came of it: open {written} in a browser.")


def command() -> str:
    """What started this process, as it was typed, but for where Python and its scripts are."""
    program, *arguments = sys.orig_argv
    if arguments[:2] == ["-m", "lightning_lora"]:
        return shlex.join(["lightning-lora", *arguments[2:]])
    if arguments and Path(arguments[0]).name == "lightning-lora":
        return shlex.join(["lightning-lora", *arguments[1:]])
    return shlex.join([Path(program).name, *arguments])


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _versions(module: L.LightningModule) -> dict[str, str]:
    device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else platform.machine()
    found = {"lightning-lora": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # lightning may be there as pytorch-lightning alone
            continue
    return found | {"python": platform.python_version(), "device": device, "system": platform.system()}


def _settings(trainer: L.Trainer, module: L.LightningModule) -> dict[str, dict[str, Any]]:
    """By part of the run, what was chosen; what is off or empty is left out."""
    data = getattr(trainer, "datamodule", None)
    parts = {
        f"adapter {injection.adapter_name} {name}".strip(): injection.peft or injection.config.to_dict()
        for name, injection in named_injections(module)
    }
    parts["model"] = {"class": type(module).__name__, **module.hparams}
    if data is not None:
        given = data.hparams or {name: getattr(data, name, None) for name in _DATA_SETTINGS}
        parts["data"] = {"class": type(data).__name__, **given}
    parts["trainer"] = {
        "precision": trainer.precision,
        "strategy": type(trainer.strategy).__name__,
        "processes": trainer.world_size,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "optimizers": ", ".join(type(each).__name__ for each in trainer.optimizers),
    }
    return {
        part: {name: _shown(value) for name, value in each.items() if value and not name.startswith("_")}
        for part, each in parts.items()
    }


def _shown(value: Any) -> str | int | float:
    value = plain(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, (int, float, str)) else str(value)


def _data(trainer: L.Trainer) -> list[Rows]:
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, FileData):
        splits = {"training": data.train_rows or [], "validation": data.val_rows}
        return [
            {"purpose": purpose, "rows": len(rows), "lengths": found._asdict() if found else None}  # type: ignore[typeddict-item]
            for purpose, rows in splits.items()
            for found in [lengths_of(data, rows)]
        ]
    loaders = {"training": trainer.train_dataloader, "validation": trainer.val_dataloaders}
    return [
        {"purpose": purpose, "rows": len(dataset), "lengths": None}
        for purpose, loader in loaders.items()
        if isinstance(dataset := getattr(loader, "dataset", None), Sized)
    ]
