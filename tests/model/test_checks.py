"""What must hold before adapters go in: who froze what, and whether the weights are there."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from lightning_lora import LoRA, LoraConfig, TargetError, adapters, inject, load_adapter, save_adapter
from lightning_lora.layers import LoraLayer


def part(kind: str) -> nn.Module:
    first = nn.Unflatten(1, (1, 8)) if kind == "conv" else nn.Identity()
    layer = nn.Conv1d(1, 1, 3, padding=1) if kind == "conv" else nn.Linear(8, 8)
    return nn.Sequential(first, layer, nn.Flatten(1))


class Distill(L.LightningModule):
    """A student, and what else there is: a teacher, a backbone, a loss network."""

    def __init__(self, student: str = "linear", other: str = "linear", is_frozen: bool = True) -> None:
        super().__init__()
        self.student, self.other = part(student), part(other)
        self.other.requires_grad_(not is_frozen)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return nn.functional.mse_loss(self.student(batch), self.other(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path: Any, pl_module: L.LightningModule, **config: Any) -> None:
    lora = LoRA(r=2, summary=False, merge=None, **config)
    toys.trainer(tmp_path, [lora], max_steps=2).fit(pl_module, DataLoader(torch.randn(8, 8), batch_size=4))


@settings(max_examples=60)
@given(
    student=st.sampled_from(["linear", "conv"]),
    is_frozen=st.booleans(),
    config=st.sampled_from(
        [
            {},
            {"exclude_modules": ["other.*"]},
            {"modules_to_save": ["student"]},
            {"target_modules": ["1"]},
            {"target_modules": ["student.1", "other.1"]},
            {"module": "other"},
        ]
    ),
)
def test_what_was_frozen_is_not_trained_unless_it_is_meant(
    tmp_path_factory: Any, student: str, is_frozen: bool, config: dict[str, Any]
) -> None:
    module = Distill(student, is_frozen=is_frozen)
    before = copy.deepcopy(module)
    meant = "modules_to_save" in config or "module" in config or "other.1" in config.get("target_modules", [])
    x = torch.randn(4, 8)
    try:
        fit(tmp_path_factory.mktemp("run"), module, **config)
    except TargetError as error:
        # Nothing is left to adapt of a convolution beside the linear layer, or the convolution is not meant.
        refused = "were frozen" in str(error)
        assert refused == (is_frozen and not meant) or "exclude_modules" in config
        assert not adapters(module)
        for name, parameter in before.named_parameters():
            own = module.get_parameter(name)
            assert torch.equal(own, parameter) and own.requires_grad == parameter.requires_grad
        return
    moved = not torch.equal(module.other(x), before.other(x))
    assert moved == (meant or not is_frozen) or config == {"exclude_modules": ["other.*"]}
    assert not (moved and "exclude_modules" in config)


def test_the_way_out_that_the_error_names(tmp_path: Any) -> None:
    with pytest.raises(TargetError, match=r"exclude_modules=\['other\.\*'\].*modules_to_save"):
        fit(tmp_path, Distill())
    fit(tmp_path, Distill(), exclude_modules=["other.*"])
    unfrozen = Distill()
    unfrozen.other.requires_grad_(True)
    fit(tmp_path, unfrozen)


def test_adapters_are_loaded_whatever_was_frozen(tmp_path: Any) -> None:
    model = inject(Distill(is_frozen=False), LoraConfig(r=2, target_modules=["1"]))
    toys.randomize(model)
    save_adapter(model, tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    frozen = Distill()
    frozen.load_state_dict(state)
    x = torch.randn(4, 8)
    torch.testing.assert_close(load_adapter(frozen, tmp_path).other(x), model.other(x))


def test_a_lazy_layer_is_refused_before_anything_is_changed() -> None:
    for lazy in (nn.LazyLinear(4), nn.LazyBatchNorm1d()):
        model = nn.Sequential(nn.Linear(8, 4), lazy)
        with pytest.raises(TargetError, match=r"'1\..*' belongs to a lazy layer.*run a batch"):
            inject(model, LoraConfig(r=2))
        model(torch.randn(4, 8))
        assert isinstance(inject(model, LoraConfig(r=2))[0], LoraLayer)


def test_all_linear_leaves_out_what_it_cannot_take() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(8, 4)), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="all-linear leaves out '0': its weight is computed of others"):
        inject(model, LoraConfig(r=2))
    assert isinstance(model[1], LoraLayer) and not isinstance(model[0], LoraLayer)
    with pytest.raises(TargetError, match="its weight is computed of others"):
        inject(nn.Sequential(weight_norm(nn.Linear(8, 4))), LoraConfig(r=2, target_modules=r"\d"))
