"""Each call that writes to the disk fails once, wherever it is made: the old is there, or the new, whole."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import toys
from helpers.failing_disk import FailingDisk
from helpers.models import tiny_llama
from helpers.saving import fit
from torch import Tensor

from lightning_lora import LoraConfig, adapter_state_dict, inject, load_adapter, save_adapter


def model_of(seed: float) -> Any:
    model = inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    toys.randomize(model, seed)
    return model


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(bool((one[name] == two[name]).all()) for name in two)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_adapter_over_an_adapter(code: int, tmp_path: Path) -> None:
    old, new = model_of(0.1), model_of(0.3)
    with pytest.MonkeyPatch.context() as patch:
        save_adapter(old, tmp_path / "counted")
        disk = FailingDisk(tmp_path, patch)
        save_adapter(new, tmp_path / "counted")
    assert disk.calls >= 5
    for number in range(disk.calls):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        save_adapter(old, folder / "adapter")
        with pytest.MonkeyPatch.context() as patch:
            failing = FailingDisk(folder, patch, number, code)
            try:
                save_adapter(new, folder / "adapter")
            except OSError as error:
                told = error.errno
            else:
                told = None
        assert failing.failed and told in (code, None)
        found = adapter_state_dict(load_adapter(tiny_llama(), folder / "adapter"))
        assert same(found, adapter_state_dict(new if told is None else old)) or same(found, adapter_state_dict(new))
        assert os.listdir(folder) == ["adapter"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_checkpoint_over_a_checkpoint(code: int, tmp_path: Path) -> None:
    trainer = fit(tmp_path / "run", merge=None)
    path = tmp_path / "kept" / "last.ckpt"
    trainer.save_checkpoint(path)
    before = adapter_state_dict(trainer.lightning_module)
    before = {name: tensor.clone() for name, tensor in before.items()}
    toys.randomize(trainer.lightning_module, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(path.parent, patch)
        trainer.save_checkpoint(path.parent / "counted.ckpt")
    (path.parent / "counted.ckpt").unlink()
    assert disk.calls >= 3
    for number in range(disk.calls):
        with pytest.MonkeyPatch.context() as patch:
            failing = FailingDisk(path.parent, patch, number, code)
            try:
                trainer.save_checkpoint(path)
            except OSError:
                told = True
            else:
                told = False
        assert failing.failed
        found = adapter_state_dict(load_adapter(toys.Toy(), path))
        assert same(found, before) or same(found, adapter_state_dict(trainer.lightning_module))
        assert told or same(found, adapter_state_dict(trainer.lightning_module))
        assert os.listdir(path.parent) == ["last.ckpt"]
