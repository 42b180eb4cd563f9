"""Layers that are copies of others start with the same adapter."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoraConfig, inject


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_vera": True}])
def test_copies_start_alike_and_others_do_not(settings: dict[str, object]) -> None:
    student = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student), "other": nn.Linear(8, 8)})
    model["teacher"][1].weight.data[-1, -1] += 1
    inject(model, LoraConfig(r=4, **settings))  # type: ignore[arg-type]
    starts = {name: list(adapter.parameters()) for name, adapter in model.named_modules() if name.endswith("default")}
    for name in ("student.0", "teacher.0"):
        ours, theirs = starts[f"{name}.lora.default"], starts["student.0.lora.default"]
        assert all(map(torch.equal, ours, theirs))
    if "use_vera" not in settings:  # whose layers all start alike
        for name in ("student.1", "teacher.1", "other"):
            assert not torch.equal(starts[f"{name}.lora.default"][0], starts["student.0.lora.default"][0])
        assert not torch.equal(starts["teacher.1.lora.default"][0], starts["student.1.lora.default"][0])


def test_equal_constants_are_no_copies() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.init.zeros_(layer.weight)
    inject(model, LoraConfig(r=2))
    assert not torch.equal(model[0].lora["default"].lora_A, model[1].lora["default"].lora_A)


def test_an_average_of_steps_follows_the_student() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"student": nn.Linear(64, 64), "teacher": nn.Linear(64, 64)})
    model["teacher"].load_state_dict(model["student"].state_dict())
    x = torch.randn(64, 64)
    base = model["student"](x).detach()
    inject(model, LoraConfig(r=4))
    optimizer = torch.optim.Adam(model["student"].lora.parameters(), 0.005)
    for _ in range(20):
        optimizer.zero_grad()
        (model["student"](x) - x.roll(1, 1)).pow(2).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(model["teacher"].lora.parameters(), model["student"].lora.parameters()):
                mean.lerp_(value, 0.004)
    moved = [(model[name](x) - base).flatten() for name in ("teacher", "student")]
    assert torch.cosine_similarity(*moved, dim=0) > 0.6  # 0.3 with another start
