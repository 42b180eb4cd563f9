"""``LoRA(merge="best")``: which checkpoint is merged, and what of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.toys import Toy, assert_same_tensors, loader
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import CheckpointError, LoRA, active_adapters, adapter_state_dict, unmerge


class Scored(Toy):
    """Its scores are given, one an epoch; outside of ``net``, it trains a scale."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores, self.scale = scores, nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.scores[self.current_epoch])
        self.log("other", -self.scores[self.current_epoch])


class Record(toys.L.Callback):
    """Keeps what is trained, after each epoch."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        found = {**adapter_state_dict(pl_module), "scale": pl_module.scale}
        self.kept.append({name: tensor.detach().clone() for name, tensor in found.items()})


def run(tmp_path: Path, scores: list[float], *keepers: dict[str, Any], **kw: Any) -> tuple[Any, Any]:
    model, record = Scored(scores), Record()
    callbacks = [ModelCheckpoint(tmp_path / str(n), **settings) for n, settings in enumerate(keepers)]
    lora = LoRA(r=2, merge="best", module="net", summary=False)
    trainer = toys.trainer(tmp_path, [lora, record, *callbacks], max_epochs=len(scores), num_sanity_val_steps=0, **kw)
    trainer.fit(model, loader(), loader())
    return unmerge(model), record


PLAIN = [{"every_n_epochs": 1, "save_top_k": -1}, {"every_n_train_steps": 3}]


@settings(max_examples=8)
@given(
    scores=st.permutations([1.0, 2.0, 3.0]),
    mode=st.sampled_from(["min", "max"]),
    others=st.lists(st.sampled_from(PLAIN), unique_by=str),
    place=st.integers(0, 2),
    twice=st.booleans(),
)
def test_the_monitored_one_is_merged_whole(
    scores: list[float],
    mode: str,
    others: list[Any],
    place: int,
    twice: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monitored = {"monitor": "score", "mode": mode}
    keepers = [*others[:place], *([{**monitored, "every_n_epochs": 2}] if twice else []), monitored, *others[place:]]
    model, record = run(tmp_path_factory.mktemp("best"), scores, *keepers)
    best = scores.index(min(scores) if mode == "min" else max(scores))
    assert_same_tensors({**adapter_state_dict(model), "scale": model.scale}, record.kept[best])


def test_what_cannot_be_told_is_refused_when_fit_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor='score', mode='min' and with monitor='other', mode='min'.*merge=N"):
        run(tmp_path, [1.0], {"monitor": "score"}, {"monitor": "other"})
    with pytest.raises(ValueError, match="monitor='score', mode='max'"):
        run(tmp_path, [1.0], {"monitor": "score"}, {"monitor": "score", "mode": "max"})
    with pytest.raises(ValueError, match=r"none of the Trainer's ModelCheckpoints keeps one: add"):
        run(tmp_path, [1.0], {"monitor": "score", "save_top_k": 0})


def test_where_nothing_is_monitored_the_newest_is_merged_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"will merge the newest checkpoint.*add ModelCheckpoint\(monitor="):
        model, record = run(tmp_path, [1.0, 2.0, 3.0], {"every_n_epochs": 2})
    assert_same_tensors({**adapter_state_dict(model), "scale": model.scale}, record.kept[1])


def test_fast_dev_run_merges_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model, record = run(tmp_path, [1.0], {"monitor": "score"}, fast_dev_run=True)
    assert_same_tensors({**adapter_state_dict(model), "scale": model.scale}, record.kept[-1])


def test_the_hook_of_loading_is_called_as_by_lightning(tmp_path: Path) -> None:
    class Hooked(Scored):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["scale"] = checkpoint["state_dict"].pop("scale")

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["scale"] = checkpoint["scale"]

    model, record = Hooked([1.0, 2.0]), Record()
    keep = ModelCheckpoint(tmp_path, monitor="score")
    lora = LoRA(r=2, merge="best", module="net", summary=False)
    toys.trainer(tmp_path, [lora, record, keep], num_sanity_val_steps=0).fit(model, loader(), loader())
    assert torch.equal(model.scale, record.kept[0]["scale"])


@settings(max_examples=8)
@given(
    same_model=st.booleans(),
    resumes=st.booleans(),
    scores=st.permutations([1.0, 2.0, 3.0, 4.0]),
)
def test_a_model_checkpoint_of_an_earlier_run(
    tmp_path_factory: pytest.TempPathFactory, same_model: bool, resumes: bool, scores: list[float]
) -> None:
    """Its best is merged where it is of this adapter, and refused before the first step where it is of another."""
    path = tmp_path_factory.mktemp("runs")
    keeper, record = ModelCheckpoint(path, monitor="score", every_n_epochs=1, save_top_k=-1, save_last=True), Record()

    def fit(model: Scored, epochs: int, ckpt_path: Any = None) -> Any:
        lora = LoRA(r=2, merge="best", module="net", summary=False)
        kw: dict[str, Any] = {"max_epochs": epochs, "num_sanity_val_steps": 0}
        toys.trainer(path, [lora, record, keeper], **kw).fit(model, loader(), loader(), ckpt_path=ckpt_path)
        return unmerge(model)

    first = Scored(scores)
    fit(first, 2)
    second = first if same_model else Scored(scores)
    if not same_model and not resumes:
        before = toys.snapshot(second)
        with pytest.raises(ValueError, match="of another adapter: give each run a ModelCheckpoint of its own"):
            fit(second, 4)
        assert_same_tensors(toys.snapshot(second), before)
        return
    fit(second, 4, "last" if resumes else None)
    ran = scores if resumes else [*scores[:2], *scores]
    best = record.kept[ran.index(min(ran))]
    found = {**adapter_state_dict(second), "scale": second.scale}
    assert_same_tensors({name: found[name].detach() for name in best}, best)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_that_another_run_has_put_there_is_not_merged(tmp_path: Path, resumed: bool) -> None:
    class Meanwhile(toys.L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            run(tmp_path / "other", [1.0], {"monitor": "score"})
            (path,) = (tmp_path / "other").rglob("*.ckpt")
            path.replace(trainer.checkpoint_callback.best_model_path)

    model, keeper = Scored([2.0, 1.0]), ModelCheckpoint(tmp_path, "best", monitor="score", save_last=True)
    settings: dict[str, Any] = {"r": 2, "module": "net", "summary": False}
    if resumed:
        toys.trainer(tmp_path, [LoRA(**settings, merge=None), keeper], max_epochs=1).fit(model, loader(), loader())
    trainer = toys.trainer(tmp_path, [LoRA(**settings, merge="best"), keeper, Meanwhile()], max_epochs=2)
    with pytest.raises(CheckpointError, match="the checkpoint of another run"):
        trainer.fit(model, loader(), loader(), ckpt_path=tmp_path / "last.ckpt" if resumed else None)
    assert active_adapters(model) == ["default"]
