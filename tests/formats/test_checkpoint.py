from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.toys import Toy, assert_same_tensors, inputs, loader, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    CheckpointError,
    LoRA,
    LoraConfig,
    active_adapters,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    set_adapter,
    unmerge,
)
from lightning_lora.formats.metadata import metadata


def refused(tmp_path: Path, path: Path, match: str, model: Any = None, lora: Any = None) -> None:
    """The checkpoint is refused with one paragraph, and the model is as it came."""
    model = model or Toy()
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    trainer = toys.trainer(tmp_path, [lora or LoRA(r=2, summary=False)])
    for run in (trainer.fit, trainer.test):
        with pytest.raises(CheckpointError, match=match) as error:
            run(model, loader(), ckpt_path=path)
        assert "\n" not in str(error.value)
        assert_same_tensors(model.state_dict(), before)
        assert [type(m) for m in model.modules()] == classes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert "configure_model" not in vars(model)


def test_other_settings_are_refused(tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    refused(tmp_path, adapter_checkpoint[0], r"r \(2 saved, 4 here\)", lora=LoRA(r=4, summary=False))
    refused(
        tmp_path, adapter_checkpoint[0], r"lora_alpha \(16 saved, 8 here\)", lora=LoRA(r=2, lora_alpha=8, summary=False)
    )
    refused(
        tmp_path, adapter_checkpoint[0], r"left over: net\.4", lora=LoRA(r=2, target_modules=["0", "6"], summary=False)
    )
    refused(
        tmp_path, adapter_checkpoint[0], "'default' on the whole module", lora=LoRA(r=2, module="net", summary=False)
    )


def test_another_base_is_refused(tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    refused(tmp_path, adapter_checkpoint[0], "trained on another base model: its fingerprint", model=Toy(seed=1))
    with pytest.raises(CheckpointError, match=f"{adapter_checkpoint[0]} .*another base model"):
        load_from_checkpoint(Toy, adapter_checkpoint[0], seed=1)
    base = Toy(seed=1)
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(base, adapter_checkpoint[0])


def test_a_file_of_anything_else_is_named(tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    content = torch.load(adapter_checkpoint[0], weights_only=True)
    content["lightning_lora"]["adapters"][0]["module"] = "absent"
    for name, of in (("list", [1]), ("text", "adapter"), ("elsewhere", content)):
        torch.save(of, tmp_path / f"{name}.ckpt")
        for read in (lambda path: load_from_checkpoint(Toy, path), lambda path: load_adapter(Toy(), path)):
            with pytest.raises(CheckpointError, match=f"{tmp_path}/{name}.ckpt"):
                read(tmp_path / f"{name}.ckpt")


def test_a_full_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, [ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(Toy(), loader())
    refused(tmp_path, tmp_path / "last.ckpt", f"{tmp_path}/last.ckpt is no adapter checkpoint: it holds 11 tensors")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/last.ckpt is no adapter checkpoint"):
        load_from_checkpoint(Toy, tmp_path / "last.ckpt")


def test_a_file_cut_short_is_refused(tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    whole = adapter_checkpoint[0].read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        short = tmp_path / "short.ckpt"
        short.write_bytes(whole[:size])
        refused(tmp_path, short, "cannot be read as a checkpoint")
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            load_from_checkpoint(Toy, short)


def test_a_newer_format_is_refused(tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    checkpoint = torch.load(adapter_checkpoint[0], weights_only=True)
    checkpoint["lightning_lora"]["format_version"] = 99
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    refused(tmp_path, tmp_path / "newer.ckpt", "format version 99")


def test_the_same_base_in_bfloat16_is_the_same_base(tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    model = Toy()
    toys.trainer(tmp_path, [LoRA(r=2, summary=False)], precision="bf16-true").test(
        model, loader(), ckpt_path=adapter_checkpoint[0]
    )
    model = load_adapter(Toy().bfloat16(), adapter_checkpoint[0])
    assert torch.isfinite(model.eval()(inputs().bfloat16())).all()


def saved(path: Path, **settings: Any) -> Path:
    model = inject(Toy(), LoraConfig(r=2, target_modules=["0", "4"], **settings))
    torch.save({"lightning_lora": metadata(model), "state_dict": adapter_state_dict(model)}, path)
    return path


BINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora_alpha": ({"lora_alpha": 3}, {}),
    "rank_pattern": ({"rank_pattern": {"net.4": 3}}, {}),
    "alpha_pattern": ({"alpha_pattern": {"net.4": 3}}, {}),
    "use_rslora": ({"use_rslora": True}, {}),
    "use_dora": ({"use_dora": True}, {}),
    "init_lora_weights": ({"init_lora_weights": "pissa"}, {}),
    "seed": ({"init_lora_weights": "pissa_niter_4", "seed": 1}, {"init_lora_weights": "pissa_niter_4", "seed": 2}),
}


@pytest.mark.parametrize("setting", BINDS)
@pytest.mark.parametrize("swapped", [False, True])
def test_settings_that_change_what_is_computed_must_be_the_same(setting: str, swapped: bool, tmp_path: Path) -> None:
    there, here = BINDS[setting][::-1] if swapped else BINDS[setting]
    model = inject(Toy(), LoraConfig(r=2, target_modules=["0", "4"], **here))
    with pytest.raises(CheckpointError, match=rf"other LoRA settings: {setting} \(.* saved, .* here\)"):
        load_adapter(model, saved(tmp_path / "x.ckpt", **there))


def test_what_two_runs_may_differ_in(tmp_path: Path) -> None:
    there = {"lora_dropout": 0.1, "rank_dropout": 0.1, "freeze_A": True, "init_lora_weights": "gaussian", "seed": 5}
    model = inject(Toy(), LoraConfig(r=2, target_modules=["0", "4"]))
    load_adapter(model, saved(tmp_path / "x.ckpt", **there))
    expected = inject(Toy(), LoraConfig(r=2, target_modules=["0", "4"], **there))
    assert_same_tensors(adapter_state_dict(model), adapter_state_dict(expected))


def test_an_adapter_on_merged_weights_says_what_they_hold(tmp_path: Path) -> None:
    model = Toy()
    for stage in ("first", "second"):
        toys.trainer(tmp_path, [LoRA(r=2, adapter_name=stage, summary=False)], max_epochs=1).fit(model, loader())
        model = unmerge(model) if stage == "second" else model
    torch.save({"lightning_lora": metadata(model), "state_dict": adapter_state_dict(model)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="Into that base, the adapter 'first' had been merged for good"):
        load_adapter(Toy(), tmp_path / "x.ckpt")


class Choose(toys.L.Callback):
    """Chooses adapters in the middle of a run."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            set_adapter(pl_module, self.names)


@settings(max_examples=6)
@given(
    chosen=st.sets(st.sampled_from(["one", "two", "three"]), min_size=1),
    reads=st.sampled_from(["module", "adapter", "resume"]),
)
def test_a_checkpoint_tells_which_adapters_were_active(
    tmp_path_factory: pytest.TempPathFactory, chosen: set[str], reads: str
) -> None:
    path, names = tmp_path_factory.mktemp("run"), ["one", "two", "three"]

    def fit(model: Toy, steps: int, *more: Any, ckpt_path: Any = None) -> Toy:
        loras = [LoRA(r=2, adapter_name=name, merge=None, summary=False) for name in names]
        keep = ModelCheckpoint(path, save_last=True, every_n_train_steps=1)
        toys.trainer(path, [*loras, *more, keep], max_steps=steps).fit(model, loader(), ckpt_path=ckpt_path)
        return model

    trained = fit(Toy(dropout=0.0), 3, Choose(sorted(chosen)))
    if reads == "module":
        found = load_from_checkpoint(Toy, path / "last.ckpt", dropout=0.0)
    elif reads == "adapter":
        found = load_adapter(Toy(dropout=0.0), path / "last.ckpt")
    else:
        found = fit(Toy(dropout=0.0), 3, ckpt_path=path / "last.ckpt")
    assert sorted(active_adapters(found)) == sorted(chosen)
    torch.testing.assert_close(toys.outputs(found), toys.outputs(trained), rtol=1e-5, atol=1e-6)
