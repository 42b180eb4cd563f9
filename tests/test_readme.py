"""What README and the tables of the documentation say is so."""

import re

import pytest
import torch
import yaml
from helpers import ROOT
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRA, LoraConfig, eject, initialize_eva, inject
from lightning_lora.layers import layer_class_for

README = (ROOT / "README.md").read_text()
VARIANTS_PAGE, SETTINGS_PAGE, RECIPES_PAGE = (
    (ROOT / "docs" / name).read_text() for name in ("variants.md", "own-trainer.md", "recipes.md")
)


class Attending(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x, x)[0]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.experts, x)


torch.manual_seed(1)
# A layer that is named "0", an input, and how to target it if not by its name.
LAYERS = {
    "`nn.Linear`": (lambda: nn.Linear(8, 8), torch.randn(2, 8)),
    "transformers' `Conv1D`": (lambda: Conv1D(8, 8), torch.randn(2, 8)),
    "`nn.Embedding`": (lambda: nn.Embedding(8, 8), torch.arange(2)),
    "`nn.Conv1d`": (lambda: nn.Conv1d(8, 8, 3), torch.randn(2, 8, 9)),
    "`nn.Conv2d`": (lambda: nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9)),
    "`nn.Conv3d`": (lambda: nn.Conv3d(8, 8, 3), torch.randn(2, 8, 5, 5, 5)),
    "convolutions with groups": (lambda: nn.Conv2d(8, 8, 3, groups=2), torch.randn(2, 8, 9, 9)),
    "`nn.MultiheadAttention`": (lambda: Attending(8, 2), torch.randn(4, 2, 8)),
    "`nn.LSTM`, `nn.GRU`, `nn.RNN`, cells": (lambda: nn.GRUCell(8, 8), torch.randn(2, 8)),
    "parts of fused q, k, v (`fused_qkv`)": (Fused, torch.randn(2, 8), {"target_modules": ["qkv"], "fused_qkv": ["q"]}),
    "stacked experts (`target_parameters`)": (
        Experts,
        torch.randn(2, 8),
        {"target_modules": [], "target_parameters": ["experts"]},
    ),
}
VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoftQ": {"init_lora_weights": "loftq_8"},
    "EVA": {"init_lora_weights": "eva"},
    "LoRA-FA": {"freeze_A": True},
    "VeRA": {"use_vera": True},
}


def works(layer: str, variant: str) -> bool:
    """Inject, run, train a little, merge and compare; ``False`` where the combination is refused."""
    make, x, *targets = LAYERS[layer]
    torch.manual_seed(0)
    module = nn.Sequential(make())
    settings = VARIANTS[variant]
    before = module(x)
    try:
        inject(module, LoraConfig(**{"r": 2, "target_modules": ["0"], **settings, **dict(*targets)}))
    except ValueError as refusal:  # of the config or, as a TargetError, of the model
        if not re.search("use_dora|use_vera|init_lora_weights|fused_qkv", str(refusal)):
            raise
        return False
    error = 1e-2 if variant == "LoftQ" else 1e-5  # its base is quantized
    if variant == "EVA":
        initialize_eva(module, [x])
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=error)
    module(x).square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.sub_(0.1 * parameter.grad)
    trained = module(x)
    assert not torch.allclose(trained, before, atol=1e-4)
    torch.testing.assert_close(eject(module, merge=True)(x), trained, rtol=1e-4, atol=1e-4)
    return True


def word_for(layer: str) -> str:
    module = LAYERS[layer][0]()
    layer_class = layer_class_for(getattr(module, "qkv", module))
    group = "" if layer_class is None or "target_parameters" in layer else layer_class.group
    return {"": "", "linear": '`"all-linear"`'}.get(group, f'`"all-linear+{group}"`')


def test_the_table_of_layers_and_variants_is_true() -> None:
    lines = [f"| layer | {' | '.join(VARIANTS)} | meant by |", "|---" * (2 + len(VARIANTS)) + "|"]
    for layer in LAYERS:
        cells = ["yes" if works(layer, variant) else "" for variant in VARIANTS]
        lines.append(f"| {' | '.join([layer, *cells, word_for(layer)])} |")
    table = re.sub(r" +", " ", "\n".join(lines))
    assert table in re.sub(r" +", " ", VARIANTS_PAGE), f"The table of docs/variants.md should be:\n{table}"


def test_the_table_of_settings_names_them_all() -> None:
    import inspect

    named = set(re.findall(r"`(\w+)`", SETTINGS_PAGE.split("| setting |")[1].split("\n\n")[0]))
    settings = set(inspect.signature(LoRA.__init__).parameters) - {"self", "config", "adapter_name"}
    assert settings <= named


def test_the_recipes_are_those_that_are_there() -> None:
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes == set(re.findall(r"`recipes/(\w+\.yaml)`", RECIPES_PAGE))
    for name in recipes - {"ddp.yaml", "fsdp.yaml", "fsdp2.yaml", "qlora.yaml", "regression.yaml"}:  # overlays
        assert {"trainer", "model", "data"} <= yaml.safe_load((ROOT / "recipes" / name).read_text()).keys()


@pytest.mark.parametrize("marker", ["quickstart", "test"])
def test_commands_are_single_lines(marker: str) -> None:
    block = README.split(f"<!-- {marker} -->\n```bash\n")[1].split("\n```")[0]
    assert "\n" not in block


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
