"""Kinds of layers and adapters from outside of the package: one class and one call, and everything works with them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRA,
    LoraConfig,
    TargetError,
    adapter_state_dict,
    adapters,
    eject,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_lora import layers as registry
from lightning_lora.layers import Adapter, LoraLayer, register_adapter_kind, register_layer_kind
from lightning_lora.layers.linear import LinearAdapter, LoraLinear
from lightning_lora.model.summary import print_summary


class Ia3Adapter(Adapter):
    """A factor for each output, (IA)^3 of Liu et al., arXiv 2205.05638, in the form that PEFT has it."""

    peft_names = {"ia3_l": "ia3_l"}
    peft_type = "IA3"
    sets_whole_weight = True

    def __init__(self, weight: Tensor, config: LoraConfig, layer_name: str, adapter_name: str, **layout: Any) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.ia3_l = nn.Parameter(torch.ones(len(weight), 1))

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        return out * self.ia3_l.flatten()

    def fold(self, weight: Tensor) -> Tensor:
        return weight * self.ia3_l

    def size(self) -> str:
        return "a vector"

    @classmethod
    def to_peft_config(cls, settings: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
        kept = ("base_model_name_or_path", "task_type", "inference_mode", "target_modules", "modules_to_save")
        return {"peft_type": "IA3", **{name: settings[name] for name in kept}, "feedforward_modules": []}

    @classmethod
    def from_peft_config(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"adapter_kind": "ia3", "target_modules": settings["target_modules"], "modules_to_save": None}


class Dense(nn.Module):
    """A linear layer that is no nn.Linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class LoraDense(LoraLayer):
    """``Dense`` with adapters."""

    adapter_class = LinearAdapter
    supported = "Dense"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, Dense)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_layer_kinds", list(registry._layer_kinds))
    monkeypatch.setattr(registry, "_adapter_kinds", dict(registry._adapter_kinds))
    register_layer_kind(LoraDense)
    register_adapter_kind("ia3", {LoraLinear: Ia3Adapter, LoraDense: Ia3Adapter})
    return


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(Dense(8, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def data() -> DataLoader:
    return toys.loader()


SETTINGS = {
    "another kind of layer": {"r": 2, "target_modules": ["body.0", "body.2"]},
    "another kind of adapter": {"adapter_kind": "ia3", "target_modules": ["body.0", "body.2"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_from_injection_to_merging_and_back(settings: dict[str, Any], tmp_path: Path) -> None:
    base, x = Net(), toys.inputs()
    weights = toys.snapshot(base)
    assert torch.equal(inject(Net(), LoraConfig(**settings))(x), base(x))
    trainer = toys.trainer(tmp_path, [LoRA(**settings, merge=None)])
    trainer.fit(base, data())
    trained = base(x)
    assert not torch.allclose(trained, Net()(x), atol=1e-3)
    toys.assert_same_tensors({n: t for n, t in base.state_dict().items() if "lora." not in n}, weights)

    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == adapter_state_dict(base).keys()
    assert torch.equal(load_from_checkpoint(Net, tmp_path / "x.ckpt")(x), trained)
    resumed = Net()
    toys.trainer(tmp_path, [LoRA(**settings, merge=None)]).fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(resumed(x), trained)

    save_adapter(base, tmp_path / "peft")
    loaded = load_adapter(Net(), tmp_path / "peft")
    assert torch.equal(loaded(x), trained)
    set_adapter(loaded, None)
    assert torch.equal(loaded(x), Net()(x))

    eject(base, merge=True)
    torch.testing.assert_close(base(x), trained, rtol=1e-5, atol=1e-6)
    assert type(base.body[0]) is Dense
    unmerge(base)
    assert torch.equal(base(x), trained)
    toys.assert_same_tensors(toys.snapshot(eject(base)), weights)


def test_peft_opens_it_and_the_other_way_round(tmp_path: Path) -> None:
    model = inject(tiny_llama(), LoraConfig(adapter_kind="ia3", target_modules=["q_proj", "v_proj"]))
    toys.randomize(model)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert all(name.endswith("ia3_l") for name in file.keys())  # noqa: SIM118


def test_what_stands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = inject(Net(), LoraConfig(adapter_kind="ia3", target_modules=["body.0"]))
    with pytest.raises(TargetError, match="sets the whole weight"):
        inject(model, LoraConfig(r=2, target_modules=["body.0"]), "second")
    assert list(adapters(model)) == ["default"]
    print_summary(model)
    assert "a vector" in capsys.readouterr().out


def test_what_is_refused() -> None:
    with pytest.raises(TargetError, match="adapter_kind='ia3' is not for this kind of layer"):
        inject(nn.Sequential(nn.Embedding(4, 4)), LoraConfig(adapter_kind="ia3", target_modules=["0"]))
    with pytest.raises(TargetError, match="no kind of adapter named 'ia4'; there are 'lora', 'dora', 'vera', 'ia3'"):
        inject(Net(), LoraConfig(adapter_kind="ia4"))
    with pytest.raises(ValueError, match="use_dora and adapter_kind='ia3' do not go together"):
        LoraConfig(adapter_kind="ia3", use_dora=True)
    with pytest.raises(ValueError, match="another kind of adapter named 'ia3'"):
        register_adapter_kind("ia3", {LoraLinear: LinearAdapter})


def test_all_linear_takes_the_new_layer() -> None:
    model = inject(Net(), LoraConfig(r=2))
    assert {name for name, module in model.named_modules() if isinstance(module, LoraLayer)} == {
        "body.0", "body.2", "head",
    }  # fmt: skip
