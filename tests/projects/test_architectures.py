"""Architectures of transformers, each through a run: injected, trained, resumed, exported, merged.

``ARCHITECTURES_TABLE=docs/architectures.md pytest -m slow tests/projects/test_architectures.py`` runs all of them, and
writes the rows of that page's table; without it, one in six is run.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from helpers import toys
from helpers.architectures import inputs_for, outputs, tensors, tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA, LoraConfig, adapter_state_dict, eject, inject, load_adapter, save_adapter
from lightning_lora.model.record import injections

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TABLE = os.environ.get("ARCHITECTURES_TABLE")
TYPES = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")][:: 1 if TABLE else 6]


class Whole(L.LightningModule):
    """A model as users have it: in training mode, with its dropout, and masks where it draws them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)
        return torch.stack([t.square().mean() for t in tensors(self.net(**batch)) if t.requires_grad]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def fit(net: nn.Module, path: Path, ckpt_path: Path | None = None) -> Whole:
    keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    lora = LoRA(r=2, merge=None, summary=False, modules_to_save=[])
    module = Whole(net)
    trainer = toys.trainer(path, [lora, keep], max_epochs=3)
    trainer.fit(module, DataLoader([inputs_for(net)], batch_size=None), ckpt_path=ckpt_path)
    return module


def farthest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(one, other))


@pytest.mark.parametrize("model_type", TYPES)
def test_an_architecture(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny(model_type)
    inputs = inputs_for(base)
    frozen = copy.deepcopy(base).requires_grad_(False).eval()
    adapted = inject(copy.deepcopy(base), LoraConfig(r=2, modules_to_save=[])).eval()
    with torch.no_grad():
        assert farthest(outputs(adapted, inputs), outputs(frozen, inputs)) < 1e-5  # attention kernels differ in a bit

    whole = fit(copy.deepcopy(base), tmp_path / "whole")
    adapter = adapter_state_dict(whole)
    assert any(tensor.any() for name, tensor in adapter.items() if name.endswith("lora_B"))
    for name, parameter in base.named_parameters():
        assert torch.equal(whole.net.get_parameter(name), parameter), name
    saved = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == adapter.keys()
    resumed = fit(copy.deepcopy(base), tmp_path / "resumed", tmp_path / "whole" / "epoch=1.ckpt")
    toys.assert_same_tensors(adapter_state_dict(resumed), adapter)

    net = whole.net.eval()
    (injection,) = injections(whole)
    layers, trained = len(list(injection.layers())), sum(p.numel() for p in net.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        learned = outputs(net, inputs)
        assert farthest(learned, outputs(frozen, inputs)) > 1e-4
        save_adapter(whole, tmp_path / "adapter")
        served = Whole(copy.deepcopy(base))
        load_adapter(served, tmp_path / "adapter")
        assert farthest(outputs(served.net.eval(), inputs), learned) < 1e-6
        merged = outputs(eject(whole, merge=True).net, inputs)
        apart = farthest(merged, learned)
        assert apart < 1e-3
        plain = copy.deepcopy(base).eval()
        plain.load_state_dict(net.state_dict())
        torch.testing.assert_close(outputs(plain, inputs), merged, rtol=0, atol=0)
    row = f"| `{model_type}` | {type(base).__name__} | {layers} | {share:.1%} | {apart:.0e} |"
    print(row)
    if TABLE:
        lines = Path(TABLE).read_text().splitlines()
        lines = [row if line.startswith(f"| `{model_type}` |") else line for line in lines]
        text = re.sub(r"transformers [\w.]+ goes", f"transformers {transformers.__version__} goes", "\n".join(lines))
        Path(TABLE).write_text(text + "\n")
