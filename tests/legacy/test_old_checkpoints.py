"""Checkpoints and adapter directories of version 0.1 still load and resume; ``make.py`` wrote them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import load_adapter

HERE = Path(__file__).parent
FILES = HERE / "files"
spec = importlib.util.spec_from_file_location("legacy_make", HERE / "make.py")
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def base() -> "make.Net":
    module = make.Net()
    module.load_state_dict(load_file(FILES / "base.safetensors"))
    return module


def outputs(module: "make.Net") -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(torch.arange(8))


@pytest.mark.parametrize("variant", list(make.VARIANTS))
def test_an_old_checkpoint_resumes(variant: str, tmp_path: Path) -> None:
    module = base()
    make.fit(module, variant, tmp_path, 10, ckpt_path=FILES / f"{variant}.ckpt", weights_only=True)
    expected = load_file(FILES / f"{variant}_outputs.safetensors")["at_10"]
    torch.testing.assert_close(outputs(module), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["lora.ckpt", "dora.ckpt", "vera.ckpt", "lora_peft"])
def test_an_old_file_loads(file: str) -> None:
    module = load_adapter(base(), FILES / file)
    expected = load_file(FILES / f"{file[:4]}_outputs.safetensors")["at_6"]
    torch.testing.assert_close(outputs(module), expected, rtol=1e-5, atol=1e-6)
