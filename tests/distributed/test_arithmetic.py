"""The formulas of ``benchmarks/arithmetic.py`` against what small runs in two processes hold and send, to the byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.distributed.llama import build
from helpers.distributed.processes import run_processes
from helpers.toys import tensors_in
from torch import Tensor

from benchmarks.arithmetic import FLOAT32, Run, full_run, lora_run, tables
from lightning_lora import LoraConfig, inject

RUNS = [
    ("ddp", 2),
    ("ddp", 0),
    ("fsdp", 2),
    ("fsdp", 0),
    ("fsdp in bfloat16", 2),
    ("fsdp2", 2),
    ("fsdp2", 0),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, int]]]]:
    path = tmp_path_factory.mktemp("wire")
    return path, run_processes("wire.count_each", str(path), RUNS)


def run_of(strategy: str, r: int) -> Run:
    sent_bytes = 2 if strategy == "fsdp in bfloat16" else FLOAT32
    settings = {"frozen_bytes": FLOAT32, "sent_bytes": sent_bytes}
    return lora_run(build(), r, **settings) if r else full_run(build(), **settings)


@pytest.mark.parametrize(("strategy", "r"), RUNS)
def test_memory(counted: Any, strategy: str, r: int) -> None:
    for rank in counted[1]:
        found, run = rank[f"{strategy} {r}"], run_of(strategy, r)
        held = found["parameters"] + found["gradients"] + found["moments"]
        if strategy == "ddp":
            assert held + found["reduced"] == run.memory_ddp()  # what is reduced is the buckets
        else:
            assert held == run.memory(2)
            assert found["largest"] == run.largest_unit()


@pytest.mark.parametrize(("strategy", "r"), RUNS)
def test_what_a_step_sends(counted: Any, strategy: str, r: int) -> None:
    """Of two ranks, each has a half of what is made whole and receives the other."""
    for rank in counted[1]:
        found, run = rank[f"{strategy} {r}"], run_of(strategy, r)
        if strategy == "ddp":
            assert found["reduced"] == run.step_ddp(2)  # a half each for reducing and for gathering the sums
        else:
            assert (found["gathered"] + found["reduced"]) / 2 == run.step_fsdp(2)


@pytest.mark.parametrize(("strategy", "r"), [(strategy, r) for strategy, r in RUNS if r])
def test_checkpoint(counted: Any, strategy: str, r: int) -> None:
    path, ranks = counted
    run = run_of(strategy, r)
    checkpoint = torch.load(path / f"{strategy} {r}.ckpt", weights_only=True)
    saved = [tensor for key in ("state_dict", "optimizer_states") for _, tensor in tensors_in(checkpoint[key])]
    assert sum(bytes_of(tensor) for tensor in saved if tensor.dim()) == run.checkpoint()
    for rank in ranks:
        received = rank[f"{strategy} {r}"]["gathered for checkpoint"] / 2
        assert received == (0 if strategy == "ddp" else run.gathered_for_checkpoint(2))


def test_a_base_in_half_precision() -> None:
    """Its adapters are float32."""
    model = inject(build().bfloat16(), LoraConfig(r=2))
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    tokens = torch.arange(8).unsqueeze(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert sum(map(bytes_of, [*parameters, *gradients, *moments])) == lora_run(build(), 2).memory(1)


def test_the_page_shows_the_tables() -> None:
    page = (ROOT / "docs" / "arithmetic.md").read_text()
    for table in tables():
        assert table in page, f"The table of docs/arithmetic.md should be:\n{table}"


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
