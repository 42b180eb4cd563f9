"""What is trained in full beside the adapters: modules, single parameters and buffers, and which heads are found."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.models import tiny_classifier, tiny_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA, LoraConfig, TargetError, disabled, eject, inject, load_adapter, merge, save_adapter
from lightning_lora.model.targets import find_modules_to_save


class Patches(L.LightningModule):
    """Bare parameters and a buffer, as vision models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.pos_embed = nn.Parameter(torch.randn(1, 3, 8))
        self.encoder.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.encoder.proj = nn.Linear(8, 8)
        self.register_buffer("centers", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.proj(x + self.encoder.pos_embed + self.encoder.cls_token) - self.centers

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.centers.add_(1)
        return self(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("names", [["pos_embed"], ["encoder.pos_embed"], ["encoder.pos_*"]])
@pytest.mark.parametrize("merging", [None, "last"])
def test_single_parameters_are_trained_and_saved_by_name(tmp_path: Path, names: list[str], merging: str | None) -> None:
    module = Patches()
    base, x = copy.deepcopy(module), torch.randn(4, 3, 8)
    lora = LoRA(r=2, modules_to_save=[*names, "centers"], merge=merging, summary=False)
    trainer = toys.trainer(tmp_path, [lora], max_epochs=1, enable_checkpointing=True)
    trainer.fit(module, DataLoader(torch.randn(8, 3, 8), batch_size=4))
    assert not torch.equal(module.encoder.pos_embed, base.encoder.pos_embed)
    assert torch.equal(module.encoder.cls_token, base.encoder.cls_token)
    assert torch.equal(module.centers, torch.full((8,), 2.0))

    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    assert {name for name in saved if ".lora." not in name} == {"encoder.pos_embed", "centers"}
    opened = load_adapter(copy.deepcopy(base), trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(opened(x), module(x))
    if merging is None:
        with disabled(module):
            assert torch.equal(module(x), base(x))
    with pytest.warns(UserWarning, match=r"PEFT .* would leave out 'encoder\.pos_embed', 'centers'"):
        save_adapter(module, tmp_path / "adapter")
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / "adapter")(x), module(x))


def test_taken_out_they_are_the_bases_own_again() -> None:
    module = Patches()
    base, x = copy.deepcopy(module), torch.randn(4, 3, 8)
    inject(module, LoraConfig(r=2, modules_to_save=["pos_embed"]))
    assert module.encoder.pos_embed.requires_grad and not module.encoder.cls_token.requires_grad
    toys.randomize(module)
    trained = module(x)
    torch.testing.assert_close(merge(module)(x), trained)
    assert torch.equal(eject(module)(x), base(x))
    assert module.encoder.cls_token.requires_grad


def test_what_is_near_a_wrong_name() -> None:
    with pytest.raises(TargetError, match=r"'pos_emb'.*no such module or parameter; near it are 'pos_embed'"):
        inject(Patches(), LoraConfig(modules_to_save=["pos_emb"]))


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("is_large", [True, False])
def test_a_frozen_reference_makes_no_head_of_the_model(is_frozen: bool, is_large: bool) -> None:
    hf = tiny_llama()
    size = sum(parameter.numel() for parameter in hf.parameters())
    width = 8 if not is_large else int((size / 2) ** 0.5) + 1
    own = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    model = nn.ModuleDict({"reference": hf.requires_grad_(not is_frozen), "own": own})
    found = find_modules_to_save(model, LoraConfig())
    assert list(found) == ([] if is_frozen and is_large else ["own"])


def test_heads_of_transformers_models_are_found() -> None:
    assert list(find_modules_to_save(tiny_classifier(), LoraConfig())) == ["classifier"]
