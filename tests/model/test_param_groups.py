import torch
from helpers.models import tiny_classifier
from helpers.toys import Toy

from lightning_lora import LoraConfig, inject, param_groups


def test_lora_plus_groups() -> None:
    model = inject(tiny_classifier(), LoraConfig(r=2, target_modules=["query"]))
    groups = param_groups(model, lr=1e-3, lora_plus_ratio=16, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, (lr, weight_decay) in found.items():
        assert lr == (16e-3 if name.endswith("lora_B") else 1e-3)
        assert weight_decay == (0.0 if name == "classifier.bias" else 0.1)
    assert len([p for group in groups for p in group["params"]]) == len(found)


def test_groups_train_in_any_optimizer() -> None:
    model = inject(Toy(), LoraConfig(r=2))
    groups = param_groups(model, lr=1e-2)
    assert len(groups) == 2  # no vectors are trained
    optimizer = torch.optim.SGD(groups)
    before = [p.detach().clone() for group in groups for p in group["params"]]
    for _ in range(2):  # A moves once B has
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    assert all(
        not torch.equal(old, new) for old, new in zip(before, (p for g in groups for p in g["params"]), strict=True)
    )
