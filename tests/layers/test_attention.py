"""LoRA on ``nn.MultiheadAttention``, fused and split."""

from pathlib import Path

import peft
import pytest
import torch
from helpers import toys
from torch import Tensor, nn

from lightning_lora import LoRA, LoraConfig, TargetError, eject, inject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.model.peft_wrapped import adopt_peft

FUSED = {}
SPLIT = {"kdim": 6, "vdim": 5}


class Model(nn.Module):
    def __init__(self, batch_first: bool = True, **sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes)
        nn.init.normal_(self.mha.in_proj_bias)
        nn.init.normal_(self.mha.out_proj.bias)
        self.head = nn.Linear(8, 3)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.head(self.mha(query, key, value)[0])


def batch(sizes: dict[str, int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, 4, width) for width in (8, sizes.get("kdim", 8), sizes.get("vdim", 8))]


def reference(model: Model) -> nn.Module:
    """The same attention on ``W + scaling * B A``, computed here."""
    mha, adapters = model.mha, {a.parameter: a for a in model.mha.lora["default"].values()}
    plain = nn.MultiheadAttention(8, 2, batch_first=True, kdim=mha.kdim, vdim=mha.vdim)
    for name, parameter in plain.named_parameters():
        parameter.data = mha.get_parameter(name).detach().clone()
        if name in adapters:
            parameter.data += 1.5 * adapters[name].lora_B.detach() @ adapters[name].lora_A.detach()
    return plain


@pytest.mark.parametrize("sizes", [FUSED, SPLIT], ids=["fused", "split"])
def test_outputs_gradients_and_merging(sizes: dict[str, int]) -> None:
    model = Model(**sizes)
    x = batch(sizes)
    model.requires_grad_(False)  # torch computes with other roundings where a gradient is wanted
    before = model(*x)
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["mha"]))
    with torch.no_grad():
        assert torch.equal(model(*x), before)
    weight = model.mha.out_proj.weight
    toys.randomize(model)
    adapted = model(*x)
    plain = reference(model)
    torch.testing.assert_close(adapted, model.head(plain(*x)[0]))
    adapted.square().sum().backward()
    model.head(plain(*x)[0]).square().sum().backward()
    for adapter in model.mha.lora["default"].values():
        gradient = plain.get_parameter(adapter.parameter).grad
        torch.testing.assert_close(adapter.lora_A.grad, 1.5 * adapter.lora_B.T @ gradient)
        torch.testing.assert_close(adapter.lora_B.grad, 1.5 * gradient @ adapter.lora_A.T)
    assert weight.grad is None
    assert "in_proj_weight" not in model.mha.__dict__ and "weight" not in model.mha.out_proj.__dict__
    merge(model)
    torch.testing.assert_close(model(*x), adapted)
    unmerge(model)
    assert model.mha.out_proj.weight is weight
    assert torch.equal(model(*x), adapted)
    eject(model, merge=True)
    assert type(model.mha) is nn.MultiheadAttention
    torch.testing.assert_close(model(*x), adapted)
    eject(unmerge(model)).requires_grad_(False)
    assert torch.equal(model(*x), before)


def test_an_error_inside_leaves_no_shadow() -> None:
    model = inject(Model(), LoraConfig(r=2, target_modules=["mha"]))
    with pytest.raises((AssertionError, RuntimeError)):
        model(torch.randn(3, 4, 7), *batch({})[1:])
    assert "in_proj_weight" not in model.mha.__dict__ and "weight" not in model.mha.out_proj.__dict__


@pytest.mark.parametrize("bias", ["none", "all"])
def test_both_directions_with_peft(bias: str, tmp_path: Path) -> None:
    """PEFT 0.21 adds the update of the output projection twice, so ours is left at zero here."""
    x = batch({})
    ours = inject(Model(), LoraConfig(r=2, lora_alpha=3, target_modules=["mha"], bias=bias)).eval()
    toys.randomize(ours)
    nn.init.zeros_(ours.mha.lora["default"]["out_proj_weight"].lora_B)
    save_adapter(ours, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours").eval()
    torch.testing.assert_close(opened(*x), ours(*x))
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["mha"])).eval()
    toys.randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_adapter(Model(), tmp_path / "theirs").eval()
    torch.testing.assert_close(read(*x), theirs(*x))
    save_adapter(read, tmp_path / "again")  # says what it computes here
    torch.testing.assert_close(load_adapter(Model(), tmp_path / "again").eval()(*x), theirs(*x))


def test_what_peft_trains_in_a_run_is_read_as_peft_runs_it(tmp_path: Path) -> None:
    """Such a file is written by this package too, and still means what PEFT computes."""
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["mha"])).eval()
    toys.randomize(theirs)
    adopt_peft(theirs, LoraConfig(), "default")
    save_adapter(theirs, tmp_path)
    torch.testing.assert_close(load_adapter(Model(), tmp_path).eval()(*batch({})), theirs(*batch({})))


def test_peft_adds_the_output_projection_twice(tmp_path: Path) -> None:
    ours = inject(Model(), LoraConfig(r=2, lora_alpha=3, target_modules=["mha"])).eval()
    toys.randomize(ours)
    with pytest.warns(
        UserWarning, match="PEFT 0.21 adds .* twice, .* something else in 'mha'.* export the merged model"
    ):
        save_adapter(ours, tmp_path)
    opened = peft.PeftModel.from_pretrained(Model(), tmp_path).eval()
    with torch.no_grad():
        ours.mha.lora["default"]["out_proj_weight"].lora_B.mul_(2)
    torch.testing.assert_close(opened(*batch({})), ours(*batch({})))


def test_split_weights_have_no_place_in_pefts_format(tmp_path: Path) -> None:
    model = inject(Model(**SPLIT), LoraConfig(r=2, target_modules=["mha"]))
    with pytest.raises(ValueError, match="separate weights for query, key and value"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_cannot_be_had(settings: dict) -> None:
    with pytest.raises(TargetError, match=f"{next(iter(settings))}.*parameters that a module reads itself"):
        inject(Model(), LoraConfig(r=2, target_modules=["mha"], **settings))


class Attending(toys.Toy):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(1)).squeeze(1)


def test_a_run_with_its_small_checkpoint(tmp_path: Path) -> None:
    def lora() -> LoRA:
        return LoRA(r=2, target_modules=["self_attn"], modules_to_save=None)

    whole = Attending()
    base = toys.snapshot(whole)
    toys.trainer(tmp_path / "whole", lora(), max_epochs=2).fit(whole, toys.loader())
    first = toys.trainer(tmp_path / "first", lora(), max_epochs=1)
    first.fit(Attending(), toys.loader())
    path = first.checkpoint_callback.best_model_path
    names = list(torch.load(path, weights_only=True)["state_dict"])
    assert len(names) == 4 and all(".self_attn.lora.default." in name for name in names)
    resumed = Attending()
    toys.trainer(tmp_path / "second", lora(), max_epochs=2).fit(resumed, toys.loader(), ckpt_path=path)
    toys.assert_same_tensors(toys.snapshot(resumed), toys.snapshot(whole))
    assert not torch.equal(whole.net[1].self_attn.in_proj_weight, base["net.1.self_attn.in_proj_weight"])
    toys.assert_same_tensors(toys.snapshot(eject(unmerge(whole))), base)


@pytest.mark.parametrize("mode", ["compiled", "autocast", "bfloat16"])
def test_ways_to_run(mode: str) -> None:
    model = inject(Model(), LoraConfig(r=2, target_modules=["mha"]))
    toys.randomize(model)
    x = batch({})
    expected = model(*x)
    if mode == "compiled":
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(*x), expected)
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(*x).float(), expected, rtol=0.1, atol=0.1)
    else:
        torch.testing.assert_close(
            model.bfloat16()(*(part.bfloat16() for part in x)).float(), expected, rtol=0.1, atol=0.1
        )
