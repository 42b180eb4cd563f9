"""Objects in a checkpoint: what needs them and is told to opens them, and what does not leaves them out unopened."""

import argparse
import contextlib
import enum
import functools
import operator
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import toys
from helpers.toys import Toy, loader, outputs
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import CheckpointError, LoRA, load_adapter, load_from_checkpoint
from lightning_lora.formats.checkpoint import read_checkpoint
from lightning_lora.formats.open_file import is_skipped, open_file
from lightning_lora.formats.saved_adapter import read


class Colour(enum.Enum):
    RED = "red"


class Outer:
    class Inner(enum.IntEnum):
        ONE = 1


class Loss(torch.nn.MSELoss):
    pass


class Holds(Toy):
    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Remembers(toys.L.Callback):
    """A callback with an object in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("here")}


OBJECTS = [
    Path("data"),
    Colour.RED,
    Outer.Inner.ONE,
    functools.partial(operator.add, 1),
    Loss(),
    Loss,
    np.float64(3),
    argparse.Namespace(width=3, path=Path("data")),
]
values = st.recursive(st.sampled_from(OBJECTS), lambda inner: st.lists(inner, min_size=1, max_size=2), max_leaves=3)


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_a_whole_run_with_objects_in_its_hyperparameters(value: Any, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    model = Holds(value)
    lora = LoRA(r=2, merge="best", summary=False)
    toys.trainer(tmp_path, [lora, keep, Remembers()]).fit(model, loader(), loader())
    last = tmp_path / "last.ckpt"
    best = load_adapter(Holds(value), keep.best_model_path)
    torch.testing.assert_close(outputs(best), outputs(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"load_from_checkpoint\(\.\.\., weights_only=False\)") as error:
        load_from_checkpoint(Holds, last)
    assert "damaged" not in str(error.value)
    assert "PosixPath" in str(error.value)
    rebuilt = load_from_checkpoint(Holds, last, weights_only=False)
    assert type(rebuilt.hparams.value) is type(value)
    assert torch.equal(outputs(rebuilt), outputs(load_adapter(Holds(value), last)))
    assert torch.equal(outputs(rebuilt), outputs(load_adapter(Holds(value), last, weights_only=False)))
    with pytest.raises(CheckpointError, match="weights_only=False to this run of the Trainer"):
        toys.trainer(tmp_path, [LoRA(r=2, summary=False)]).fit(Holds(value), loader(), ckpt_path=last)
    toys.trainer(tmp_path, [LoRA(r=2, adapter=last, summary=False)], max_epochs=1).fit(Holds(value), loader())
    resumed = toys.trainer(tmp_path, [LoRA(r=2, summary=False)], max_epochs=3)
    resumed.fit(Holds(value), loader(), ckpt_path=last, weights_only=False)
    assert resumed.global_step == 12
    assert read(last).tensors.keys() == read_checkpoint(last)["state_dict"].keys()


@given(value=values)
def test_what_is_skipped_takes_nothing_else_with_it(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("skip") / "x.ckpt"
    torch.save({"before": torch.ones(2), "object": value, "after": [1, {"x": torch.zeros(1)}]}, path)
    found = open_file(path, "skip")
    assert torch.equal(found["before"], torch.ones(2))
    assert found["after"] == [1, {"x": torch.zeros(1)}]
    assert is_skipped(found["object"])
    assert not is_skipped(found["after"])


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "lightning_lora"])
def test_nothing_in_a_file_is_run(place: str, tmp_path: Path, adapter_checkpoint: tuple[Path, Any]) -> None:
    mark, path = tmp_path / "mark", tmp_path / "x.ckpt"
    for number, call in enumerate((Runs(exec, f"open({str(mark)!r}, 'w')"), Runs(open, str(mark), "w"))):
        checkpoint = torch.load(adapter_checkpoint[0], weights_only=True)
        target = checkpoint.setdefault(place, {})
        target[next(iter(target), "x") if number else "x"] = call
        torch.save(checkpoint, path)
        for use in (lambda: read(path), lambda: load_adapter(Toy(), path), lambda: load_from_checkpoint(Toy, path)):
            with contextlib.suppress(CheckpointError):
                use()
            assert not mark.exists()
    pickle.loads(pickle.dumps(call))
    assert mark.exists()  # it would have


def test_a_best_checkpoint_of_an_earlier_process_is_opened_as_the_run_was_told(tmp_path: Path) -> None:
    """A file that is resumed names the best one, which so may come from anywhere."""
    (tmp_path / "a").mkdir()
    keep = ModelCheckpoint(tmp_path / "a", monitor="val_loss", save_last=True)
    toys.trainer(tmp_path, [LoRA(r=2, summary=False), keep], max_epochs=1).fit(Toy(), loader(), loader())
    mark = tmp_path / "mark"
    best = torch.load(keep.best_model_path, weights_only=True)
    torch.save({**best, "hyper_parameters": {"x": Runs(open, str(mark), "w")}}, keep.best_model_path)

    class Worse(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1e9)

    for weights_only in (True, False):
        assert not mark.exists()
        keep = ModelCheckpoint(tmp_path / "a", monitor="val_loss")
        trainer = toys.trainer(tmp_path, [LoRA(r=2, merge="best", summary=False), keep])
        trainer.fit(Worse(), loader(), loader(), ckpt_path=tmp_path / "a" / "last.ckpt", weights_only=weights_only)
    assert mark.exists()
