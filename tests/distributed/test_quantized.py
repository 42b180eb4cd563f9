"""Quantized bases in two processes, beside one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed.processes import run_processes
from helpers.quantized import kinds
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def run(path: Path, strategy: str, kind: str) -> dict[str, Any]:
    settings = {
        "directory": str(path / strategy), "strategy": strategy, "max_steps": 4, "merge": "last", "export": True,
        "model": {"quantized": kind}, "shard": strategy == "fsdp2",
    }  # fmt: skip
    ranks = run_processes("sharded.several", [settings], world_size=1 if strategy == "one" else 2, limit=100)
    runs = [rank["runs"][0] for rank in ranks]
    assert all("error" in each or each["losses"] == runs[0]["losses"] for each in runs)
    return runs[0]


@kinds("nf4 in float32")
def test_the_same_training_under_every_strategy(kind: str, tmp_path: Path) -> None:
    one = run(tmp_path, "one", "nf4")
    merged = load_file(tmp_path / "one" / "export" / "merged" / "model.safetensors")
    for strategy in ("ddp", "fsdp", "fsdp2"):
        found = run(tmp_path, strategy, kind)
        assert found["fingerprints"] == one["fingerprints"]
        assert found["losses"] == pytest.approx(one["losses"], abs=2e-6)
        exported = load_file(tmp_path / strategy / "export" / "merged" / "model.safetensors")
        assert exported.keys() == merged.keys()
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


@kinds("int8", "torchao int8", "torchao nf4", "hqq 4")
def test_what_cannot_be_cut_up_trains_under_ddp_and_is_refused_by_fsdp(kind: str, tmp_path: Path) -> None:
    one = run(tmp_path, "one", kind)
    assert run(tmp_path, "ddp", kind)["losses"] == pytest.approx(one["losses"], abs=2e-6)
    assert "cannot be cut up. Nothing was changed." in run(tmp_path, "fsdp", kind)["error"]


@kinds("nf4")
def test_packed_integers_are_refused_by_fsdp(kind: str, tmp_path: Path) -> None:
    assert "bnb_4bit_quant_storage" in run(tmp_path, "fsdp", kind)["error"]
