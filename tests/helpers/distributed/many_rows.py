"""Fits on a file of many rows, which one process encodes for all."""

from pathlib import Path
from typing import Any

import lightning as L

from lightning_lora import LoRA
from lightning_lora.data import ChatData, from_files
from lightning_lora.data.record import Record
from lightning_lora.tasks import CausalLM


class Counted(ChatData):
    """Counts what this very process encodes; those that it starts count for themselves."""

    calls = 0

    def encode(self, record: Record) -> Any:
        Counted.calls += 1
        return super().encode(record)


def fit(directory: str, many: int, **options: Any) -> dict[str, Any]:
    from_files._MANY = many
    data = Counted(f"{directory}/rows.jsonl", cache_dir=f"{directory}/cache", max_length=32, **options)
    trainer = L.Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        limit_val_batches=1,
        callbacks=[LoRA(r=2, target_modules="all-linear", summary=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(CausalLM(f"{directory}/model"), data)
    return {
        "encoded": Counted.calls,
        "rows": [data.train_rows[:], data.val_rows[:]],
        "steps": trainer.global_step,
        "kept": sorted(each.name for each in Path(directory, "cache").glob("*")),
    }


def fit_twice(directory: str, many: int) -> dict[str, Any]:
    """Of two fits, what the first found and what the second still encoded."""
    first = fit(directory, many)
    again = fit(directory, many)
    assert (again["rows"], again["kept"]) == (first["rows"], first["kept"])
    return {**first, "encoded again": again["encoded"] - first["encoded"]}
