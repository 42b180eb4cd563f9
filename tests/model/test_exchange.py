"""What is in the model and what is aside change places: in every mode, dtype and device, under every name, at once."""

from typing import Any

import pytest
import torch
from helpers.toys import assert_same_tensors, randomize, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoraConfig, disabled, eject, inject, merge, unmerge
from lightning_lora.model.record import injections

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"modules_to_save": None},
    "modules_to_save": {"modules_to_save": ["head"]},
    "tied modules_to_save": {"modules_to_save": ["embed", "out"]},
    "biases": {"modules_to_save": None, "bias": "all"},
    "PiSSA": {"modules_to_save": None, "init_lora_weights": "pissa"},
}
MODES: dict[str, Any] = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


class Net(nn.Module):
    """Layers with a second name, two that are tied, and a norm whose buffers are of several types."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.alias = self.body
        self.embed, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.out.weight = self.embed.weight
        if tied:
            self.body[1].weight = self.body[0].weight
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head.register_buffer("phase", torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.embed(self.body(x))))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def off_and_on(model: nn.Module) -> None:
    with disabled(model):
        pass


def merged_and_back(model: nn.Module) -> None:
    unmerge(merge(model))


OPERATIONS = {"disabled": off_and_on, "merge, unmerge": merged_and_back, "eject merged": lambda m: eject(m, merge=True)}


@pytest.mark.filterwarnings("ignore:.*tied to.*")
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(sorted(MODES)), st.sampled_from(sorted(OPERATIONS))), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_model_can_be_trained_whatever_was_exchanged(
    kind: str, tied: bool, steps: list[tuple[str, str]], dtype: torch.dtype
) -> None:
    model = inject(Net(tied), LoraConfig(r=2, target_modules=["body.0"], **CONFIGS[kind]))
    randomize(model)
    model.to(dtype)
    before = snapshot(model)
    for mode, name in steps:
        with MODES[mode]():
            OPERATIONS[name](model)
        if name == "eject merged":
            break
    else:
        assert_same_tensors(snapshot(model), before)
        eject(model)
    assert not [name for name, tensor in tensors(model).items() if tensor.is_inference()]
    model.requires_grad_(True)
    model(torch.randn(3, 4, dtype=dtype)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "plain"])
def test_all_that_is_aside_goes_where_the_model_goes(kind: str) -> None:
    model = inject(Net(False), LoraConfig(r=2, target_modules=["body.0"], **CONFIGS[kind])).to("meta")
    with disabled(model):
        assert {tensor.device.type for tensor in tensors(model).values()} == {"meta"}


def test_every_name_of_what_is_tied_has_the_base_aside() -> None:
    model = inject(Net(False), LoraConfig(r=2, target_modules=["body.0"], **CONFIGS["tied modules_to_save"]))
    base = Net(False).embed.weight
    with torch.no_grad():
        model.embed.weight.add_(1)
    aside = injections(model)[0].aside
    assert aside.keys() == {"embed.weight", "out.weight"}
    assert all(torch.equal(tensor, base) for tensor in aside.values())
    assert model.out.weight is model.embed.weight


@pytest.mark.parametrize("kind", ["biases", "PiSSA"])
def test_the_model_is_walked_through_once_and_not_for_each_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[nn.Module] = []
    real = nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks.append(self)
        return real(self, *args, **kwargs)

    def walked(layers: int) -> tuple[int, int]:
        """How often ``named_modules`` of the model itself is asked for, by injection and by one exchange."""
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
        walks.clear()
        inject(model, LoraConfig(r=2, target_modules=r"\d+", **CONFIGS[kind]))
        injected = sum(each is model for each in walks)
        walks.clear()
        injections(model)[0].switch(False)
        return injected, sum(each is model for each in walks)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    assert walked(3) == walked(20)
