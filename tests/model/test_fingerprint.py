"""Which bases are taken for the same, and which are not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from helpers.toys import Toy, loader, outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import (
    CheckpointError,
    LoRA,
    LoraConfig,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_lora.model.fingerprint import Fingerprint, fingerprint
from lightning_lora.model.record import injections_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def of(model: nn.Module, **settings: Any) -> Fingerprint:
    config = LoraConfig(**{"r": 2, "target_modules": ["0"], **settings})
    adapted = inject(copy.deepcopy(model), config)
    return fingerprint(injections_of(adapted)[-1])


def net(seed: int, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), nn.LayerNorm(4))
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    model.register_buffer("positions", torch.arange(5))
    return model


def both(one: Fingerprint, other: Fingerprint) -> bool:
    assert one.fits(other) == other.fits(one)
    return one.fits(other)


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    casts=st.lists(st.sampled_from(DTYPES), max_size=2),
    other_casts=st.lists(st.sampled_from(DTYPES), max_size=1),
)
@example(seed=0, scale=1e-3, casts=[torch.bfloat16, torch.float16], other_casts=[torch.bfloat16])
def test_copies_in_other_precision_are_the_same_base(
    seed: int, scale: float, casts: list[torch.dtype], other_casts: list[torch.dtype]
) -> None:
    one, other = net(seed, scale), net(seed, scale)
    for dtype in casts:
        one = one.to(dtype)
    for dtype in other_casts:
        other = other.to(dtype)
    halves = [[dtype for dtype in each if dtype is not torch.float32] for each in (casts, other_casts)]
    if halves[0] == [torch.float16, torch.bfloat16] and halves[1] == [torch.bfloat16]:
        return  # rounded twice, a value may be another one of the same format
    assert both(of(one), of(other))


@given(
    seed=st.integers(0, 1000),
    change=st.sampled_from([1e-4, 1e-3, 1e-2]),
    where=st.sampled_from(["0.weight", "2.weight", "2.bias", "3.weight", "1.running_var"]),
)
def test_a_base_that_was_tuned_is_another(seed: int, change: float, where: str) -> None:
    one, other = net(seed), net(seed)
    other.state_dict()[where].mul_(1 + change)
    assert not both(of(one), of(other))
    if change > 2**-8:  # coarser than what a cast to bfloat16 does
        tuned = other.state_dict()[where]
        tuned.mul_(1 + change)
        assert not both(of(one.bfloat16()), of(other))
    assert not both(of(net(seed)), of(net(seed + 1)))


def test_whole_numbers_and_names_and_shapes_count() -> None:
    base = net(0)
    moved = net(0)
    moved.positions[3] = 9
    assert not both(of(base), of(moved))
    assert both(of(base), of(moved.register_buffer("positions", torch.arange(5)) or moved))
    assert not both(of(base), of(nn.Sequential(*net(0)[:3])))


def test_files_without_samples_are_compared_as_before() -> None:
    base = of(net(0))
    assert both(Fingerprint(base.short), base)
    assert not both(Fingerprint("0" * 16), base)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_merged_or_named_twice_does_not_change_it(merged: bool) -> None:
    model = net(0)
    model.again = model[0]
    start = {"r": 2, "target_modules": ["0"], "init_lora_weights": "pissa"}
    before = of(model, **start)
    inject(model, LoraConfig(**start))
    toys.randomize(model)
    if merged:
        merge(model)
    assert fingerprint(injections_of(model)[0]) == before


@settings(max_examples=6)
@given(seeds=st.tuples(st.integers(0, 9), st.integers(10, 19)), tied=st.booleans(), rows=st.integers(1, 3))
def test_rows_that_the_adapter_replaces_do_not_count(seeds: tuple[int, int], tied: bool, rows: int) -> None:
    def build(seed: int) -> nn.Module:
        model = tiny_llama(tie_word_embeddings=tied)
        old = model.get_input_embeddings().weight.shape[0]
        torch.manual_seed(seed)
        model.resize_token_embeddings(old + rows, mean_resizing=False)
        if not tied:  # whose new rows no adapter replaces
            model.lm_head.weight.data[-rows:] = 0
        return model

    new = list(range(len(build(0).get_input_embeddings().weight)))[-rows:]
    chosen = {"target_modules": ["q_proj"], "trainable_token_indices": new}
    one, other = build(seeds[0]), build(seeds[1])
    assert both(of(one, **chosen), of(other, **chosen))
    other.get_input_embeddings().weight.data[: new[0]].mul_(1.01)
    assert not both(of(one, **chosen), of(other, **chosen))


KINDS = {
    "coo": lambda: torch.eye(8).to_sparse(),
    "csr": lambda: torch.eye(8).to_sparse_csr(),
    "csc": lambda: torch.eye(8).to_sparse_csc(),
    "bsr": lambda: torch.eye(8).to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8),
    "per channel": lambda: torch.quantize_per_channel(
        torch.eye(8), torch.full((8,), 0.1), torch.zeros(8).long(), 0, torch.qint8
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "expanded": lambda: torch.ones(1).expand(4),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_beside_buffers_of_every_kind(kind: str, tmp_path: Path) -> None:
    class Graph(Toy):
        def __init__(self, factor: float = 1.0) -> None:
            super().__init__()
            buffer = KINDS[kind]()
            self.register_buffer("graph", buffer * factor if factor != 1.0 else buffer)

    model = Graph()
    lora = LoRA(r=2, export_dir=tmp_path / "x")
    toys.trainer(tmp_path, [lora, ModelCheckpoint(tmp_path, save_last=True)]).fit(model, loader())
    assert (
        tmp_path / "x" / "merged" / ("model.safetensors" if kind in ("complex", "float8") else "model.pt")
    ).is_file()
    assert torch.equal(
        outputs(load_from_checkpoint(Graph, tmp_path / "last.ckpt")),
        outputs(load_adapter(Graph(), tmp_path / "x" / "adapter")),
    )
    if kind in ("coo", "csr", "complex", "complex128", "expanded"):
        with pytest.raises(CheckpointError, match="another base"):
            load_adapter(Graph(2.0), tmp_path / "last.ckpt")


def test_a_directory_goes_by_samples_too(tmp_path: Path) -> None:
    model = inject(net(0).half(), LoraConfig(r=2, target_modules=["0"]))
    save_adapter(model, tmp_path)
    load_adapter(net(0), tmp_path)
    load_adapter(net(0).bfloat16(), tmp_path)
    other = net(0)
    other[2].weight.data.mul_(1.01)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(other, tmp_path)


def test_it_takes_little_room() -> None:
    for layers in (1, 290, 2000):
        found = of(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers))))
        assert found.samples is not None
        assert len(found.samples) < min(32_000, 100 * layers) + 30 * layers
