"""What is done to a model after its adapter was merged, or while parts of it are exchanged, stays done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.toys import Toy, assert_same_tensors, loader, outputs, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from lightning_lora import (
    LoRA,
    LoraConfig,
    adapters,
    add_adapter,
    disabled,
    eject,
    inject,
    merge,
    set_adapter,
    unmerge,
)

CHANGES: dict[str, Any] = {
    "load_state_dict": lambda model, path: model.load_state_dict(Toy(5).state_dict()),
    "one weight in place": lambda model, path: model.net[4].weight.data.mul_(1.5),
    "a new parameter": lambda model, path: setattr(model.net[4], "weight", nn.Parameter(torch.ones(16, 16))),
    "full training": lambda model, path: toys.trainer(path).fit(model, loader()),
}
CHANGES |= {
    name: lambda model, path, put=put: put(model.net[4])
    for name, put in {
        "a parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        "a norm of weights": parametrizations.weight_norm,
        "a norm of weights of the older kind": weight_norm,
        "a spectral norm": lambda layer: parametrizations.spectral_norm(layer, n_power_iterations=15).eval(),
        "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "pruning nothing": lambda layer: prune.identity(layer, "weight"),
    }.items()
}
USES: dict[str, Any] = {
    "unmerge": lambda model, path: unmerge(model),
    "a test with LoRA": lambda model, path: toys.trainer(path, [LoRA(r=2, summary=False)]).test(
        model, loader(), verbose=False
    ),
    "a test with other settings": lambda model, path: toys.trainer(path, [LoRA(r=3, summary=False)]).test(
        model, loader(), verbose=False
    ),
    "the Trainer's save_checkpoint": lambda model, path: model.trainer.save_checkpoint(path / "x.ckpt"),
}


@settings(max_examples=40)
@given(change=st.sampled_from(sorted(CHANGES)), use=st.sampled_from(sorted(USES)))
def test_whatever_was_done_to_merged_weights_stays(
    change: str, use: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, path = Toy(), tmp_path_factory.mktemp("merged")
    toys.trainer(path, [LoRA(r=2, summary=False)]).fit(model, loader())
    CHANGES[change](model, path)
    before = outputs(model)
    USES[use](model, path)
    assert torch.equal(outputs(eject(model) if "lora" in str(list(model.state_dict())) else model), before)


@settings(max_examples=16)
@given(change=st.sampled_from(sorted({*CHANGES} - {"full training", "load_state_dict"})), taken_out=st.booleans())
def test_whatever_was_done_to_merged_layers_stays(change: str, taken_out: bool) -> None:
    model = inject(Toy(), LoraConfig(r=2))
    toys.randomize(model)
    eject(model, merge=True) if taken_out else merge(model)
    CHANGES[change](model.eval(), Path())
    before = outputs(model)
    assert torch.equal(outputs(unmerge(model)), before)
    assert not adapters(model)


def test_a_second_fit_trains_on_the_merged_weights(tmp_path: Path) -> None:
    model = Toy()
    toys.trainer(tmp_path, [LoRA(r=2, summary=False)]).fit(model, loader())
    first = snapshot(model)
    toys.trainer(tmp_path, [LoRA(r=4, lora_alpha=4, summary=False)]).fit(model, loader())
    assert not torch.equal(model.net[4].weight, first["net.4.weight"])
    unmerge(model)
    assert_same_tensors(snapshot(eject(model)), first)


@pytest.mark.parametrize("put", ["merge", "eject"])
def test_the_base_comes_back_in_the_dtype_that_the_model_has_by_then(put: str) -> None:
    model = inject(Toy(), LoraConfig(r=2, modules_to_save=["net.6"], target_modules=["net.0", "net.4"]))
    toys.randomize(model)
    merge(model) if put == "merge" else eject(model, merge=True)
    unmerge(model.bfloat16())
    with disabled(model):
        assert torch.isfinite(outputs(model)).all()
    eject(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(outputs(model), outputs(Toy().bfloat16()))


def test_statistics_of_what_is_trained_in_full_are_the_adapters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)))
    base, config = snapshot(model), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    add_adapter(inject(model, config), config, "second")
    for _ in range(3):
        model(torch.randn(16, 8) + 3)
    assert not torch.equal(model[1][0].running_mean, base["1.0.running_mean"])
    with disabled(model):
        assert torch.equal(model[1][0].running_mean, base["1.0.running_mean"])
    set_adapter(model, "second")
    assert torch.equal(model[1][0].running_mean, base["1.0.running_mean"])
    set_adapter(model, "default")
    assert_same_tensors(snapshot(eject(model)), base)


def test_hooks_and_attributes_of_parameters_stay(tmp_path: Path) -> None:
    class Masked(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[4].weight.no_decay = True
            self.net[4].weight.register_hook(lambda gradient: gradient * (torch.arange(16) == 0))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)  # which moves nothing without a gradient

    def moved(model: nn.Module, *callbacks: Any) -> list[int]:
        before = model.net[4].weight.detach().clone()
        toys.trainer(tmp_path, list(callbacks)).fit(model, loader())
        assert model.net[4].weight.no_decay
        return (model.net[4].weight != before).any(0).nonzero().flatten().tolist()

    full = LoRA(r=2, modules_to_save=["net.4"], target_modules=["net.0"], summary=False)
    assert moved(Masked(), full) == moved(Masked()) == [0]
    model = Masked()
    moved(model, LoRA(r=2, summary=False))
    assert moved(model) == [0]
