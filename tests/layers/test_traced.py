"""Graphs that torch.fx makes of adapted models, adapters in models that are such graphs, and scripted parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.runs import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, fx, nn

from lightning_lora import LoRA, LoraConfig, eject, inject, load_adapter, merge, unmerge

MODELS: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4), {}),
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(5, 2)),
        torch.randn(3, 4, 5),
        {"target_modules": "all-linear+conv"},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)),
        torch.arange(3),
        {"target_modules": ["0", "1"]},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("traced_first", [False, True])
def test_traced_by_fx(kind: str, traced_first: bool) -> None:
    make, x, settings = MODELS[kind]
    model = make()
    graph = fx.symbolic_trace(model) if traced_first else None
    before = model(x)
    adapted = inject(graph or model, LoraConfig(r=2, **settings))
    graph = graph or fx.symbolic_trace(adapted)
    torch.testing.assert_close(graph(x), before, rtol=0, atol=0)
    toys.randomize(adapted)
    trained = adapted(x)
    assert not torch.allclose(trained, before)
    torch.testing.assert_close(graph(x), trained, rtol=0, atol=0)
    graph(x).sum().backward()
    assert all(p.grad is not None for p in graph.parameters() if p.requires_grad)
    torch.testing.assert_close(merge(adapted)(x), trained)
    torch.testing.assert_close(graph(x), trained)
    torch.testing.assert_close(unmerge(adapted)(x), graph(x), rtol=0, atol=0)


@pytest.mark.parametrize("compiled", ["scripted", "traced"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_beside_parts_of_torchscript(tmp_path: Path, compiled: str) -> None:
    """They are of the frozen base, and no layers to adapt."""

    class Part(toys.Toy):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
            self.part = torch.jit.script(part) if compiled == "scripted" else torch.jit.trace(part, torch.ones(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.part(x))

    base = toys.snapshot(Part())
    model, trainer = fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), model=Part(), lora=LoRA(r=2, merge=None))
    path = trainer.checkpoint_callback.last_model_path
    toys.assert_adapter_only(path, base)
    out = toys.outputs(model)
    torch.testing.assert_close(toys.outputs(load_adapter(Part(), path)), out, rtol=0, atol=0)
    torch.testing.assert_close(toys.outputs(merge(model)), out)
    toys.assert_same_tensors(toys.snapshot(eject(unmerge(model))), base)
