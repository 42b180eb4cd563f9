"""Random state of the CPU and, by stand-ins for their modules of torch, of GPUs that are not here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.rng import rng_state, seeded, set_rng_state


class Devices:
    """What torch.cuda and torch.xpu have of random state, for two devices."""

    def __init__(self) -> None:
        self.states = [torch.tensor([1]), torch.tensor([2])]

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state_all(self) -> list[Tensor]:
        return [state.clone() for state in self.states]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        self.states = list(states)


class Mps:
    """What torch.mps has."""

    state = torch.tensor([3])

    def get_rng_state(self) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, state: Tensor) -> None:
        self.state = state


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_state_of_every_device_comes_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices()
    monkeypatch.setattr(torch, kind, devices)
    state = rng_state()
    devices.states = [torch.tensor([8]), torch.tensor([9])]
    set_rng_state(state)
    assert [int(each) for each in devices.states] == [1, 2]
    devices.states = [torch.tensor([8])]  # resumed with another number of devices
    set_rng_state(state)
    assert [int(each) for each in devices.states] == [8]


def test_that_of_apples_gpus_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = Mps()
    monkeypatch.setattr(torch, "mps", mps)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    state = rng_state()
    mps.state = torch.tensor([9])
    set_rng_state(state)
    assert int(mps.state) == 3


def test_a_state_of_a_machine_without_them_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    state = rng_state()
    assert "xpu" not in state
    assert "mps" not in state
    expected = torch.rand(2)
    monkeypatch.setattr(torch, "xpu", Devices())
    monkeypatch.setattr(torch, "mps", Mps())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    set_rng_state(state)
    assert torch.equal(torch.rand(2), expected)


def test_a_seed_is_for_its_block_and_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = []
    for module in (torch.cuda, torch.xpu, torch.mps):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(module, name, others.append, raising=False)
    before = torch.get_rng_state()
    with seeded(5, torch.device("cpu")):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert others == []
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_a_seed_for_what_has_no_values_yet_changes_nothing() -> None:
    before = torch.get_rng_state()
    with seeded(5, torch.device("meta")):
        torch.rand(3, device="meta")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_on_another_device_goes_to_its_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.xpu is asked, whose generator a stand-in on the CPU plays."""
    held = {"state": torch.Generator().manual_seed(1).get_state()}

    class Xpu:
        def get_rng_state(self, device: object) -> Tensor:
            return held["state"]

        def set_rng_state(self, state: Tensor, device: object) -> None:
            held["state"] = state

    monkeypatch.setattr(torch, "xpu", Xpu())
    monkeypatch.setattr(torch, "Generator", lambda device, make=torch.Generator: make())
    cpu, first = torch.get_rng_state(), held["state"]
    with seeded(5, torch.device("xpu", 0)):
        assert not torch.equal(held["state"], first)
    assert torch.equal(held["state"], first)
    assert torch.equal(torch.get_rng_state(), cpu)
