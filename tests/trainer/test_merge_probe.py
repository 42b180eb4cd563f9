import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.models import IDS, Wrapped, batches
from helpers.runs import fit
from helpers.toys import Toy, loader, trainer
from torch import Tensor, nn

from lightning_lora import LoRA, LoraConfig, inject
from lightning_lora.layers import Adapter
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.trainer.merge_probe import MergeProbe


def exported(tmp_path: Path, **settings: Any) -> LoRA:
    return LoRA(r=2, summary=False, export_dir=tmp_path / "out", **settings)


def apart(tmp_path: Path) -> float:
    found = re.search(r"\| merged outputs apart \| (.*) \|", (tmp_path / "out/adapter/README.md").read_text())
    assert found
    return float(found[1])


def test_the_card_says_how_far_the_merged_model_is(tmp_path: Path) -> None:
    fit(tmp_path, lora=exported(tmp_path))
    assert apart(tmp_path) < 1e-6
    run = trainer(tmp_path, [exported(tmp_path, target_modules=["q_proj", "mlp.*"])], precision="bf16-true")
    run.fit(Wrapped(), batches(IDS, IDS + 1))
    assert 1e-4 < apart(tmp_path) < 0.1


def test_a_merge_that_computes_something_else_ends_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: LinearAdapter, weight: Tensor) -> Tensor:
        return weight + 2 * self.scaling * self.lora_B @ self.lora_A

    monkeypatch.setattr(LinearAdapter, "fold", twice)
    monkeypatch.setattr(LinearAdapter, "row_fold", Adapter.row_fold)
    with pytest.raises(RuntimeError, match=r"does not compute what was trained: .* of the Sequential are .* apart"):
        fit(tmp_path, lora=exported(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]
    fit(tmp_path, lora=exported(tmp_path, verify=False))
    assert (tmp_path / "out/merged").is_dir()


class Held(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Doubled()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(*batch).sum()


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.more: Any = 0

    def forward(self, x: Tensor, other: Any = None) -> Tensor:
        return self.b(self.a(x)) + self.more


def probed(*batch: Any) -> tuple[Held, MergeProbe]:
    module = inject(Held(), LoraConfig(r=2, target_modules=["a", "b"]))
    probe = MergeProbe(module)
    module.training_step(batch, 0)
    return module, probe


def test_few_outputs_that_differ_are_a_warning_and_most_are_an_error() -> None:
    torch.manual_seed(0)
    module, probe = probed(torch.randn(1, 50, 4))
    module.net.more = torch.zeros(50, 4).index_fill(0, torch.tensor([7]), -torch.inf)  # as masks are
    probe.look()
    assert probe.difference() == 0
    module.net.more = 0
    probe.look()
    module.net.more = torch.zeros(50, 4).index_fill(0, torch.tensor([3]), 1.0)
    with pytest.warns(UserWarning, match="A few outputs of the merged Doubled"):
        assert probe.difference() > 0.1
    module.net.more = torch.ones(50, 4)
    with pytest.raises(RuntimeError, match=r"LoRA\(verify=False\)"):
        probe.difference()
    module.net.more = torch.full((50, 4), torch.nan)
    with pytest.raises(RuntimeError):
        probe.difference()


def test_what_cannot_be_called_again_is_left_out() -> None:
    module, probe = probed(torch.randn(2, 4), object())
    probe.look()
    assert probe.difference() is None
    module, probe = probed(torch.randn(2, 4))
    module.net.more = "text"
    with pytest.warns(UserWarning, match="not verified, since the model cannot be called after the run: TypeError"):
        probe.look()
    assert probe.difference() is None


def test_a_model_that_cannot_be_called_once_merged_is_exported_all_the_same() -> None:
    module, probe = probed(torch.randn(2, 4))
    probe.look()
    module.net.more = "text"
    with pytest.warns(UserWarning, match="not verified, since the model cannot be called after the run: TypeError"):
        assert probe.difference() is None


def test_a_module_inside_is_looked_at_where_the_step_alone_can_call_the_outer_one() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.in_step = Doubled(), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.in_step:
                raise ValueError("not in a step")
            return self.inner(x + 1)

    class Steps(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.outer.in_step = True
            loss = self.outer(batch).sum()
            self.outer.in_step = False
            return loss

    module = inject(Steps(), LoraConfig(r=2, target_modules=["a", "b"]))
    probe = MergeProbe(module)
    module.training_step(torch.randn(3, 4), 0)
    probe.look()
    assert probe.difference() == 0
    module.outer.inner.more = 9.0
    with pytest.raises(RuntimeError, match="of the Doubled are"):
        probe.difference()
    assert not any(each._forward_pre_hooks for each in module.modules())


def test_the_probe_leaves_no_trace(tmp_path: Path) -> None:
    random: list[Tensor] = []

    class Looks(Toy):
        def on_fit_end(self) -> None:
            random.append(torch.get_rng_state())

    modules = []
    for verify in (True, False):
        torch.manual_seed(4)
        model = Looks()
        run = trainer(tmp_path, [exported(tmp_path, verify=verify)])
        run.fit(model, loader())
        assert not any(module._forward_pre_hooks for module in model.modules())
        modules.append(model)
    assert torch.equal(*random)
    for one, other in zip(*(model.state_dict().values() for model in modules), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_step_is_left_alone(tmp_path: Path) -> None:
    class Quiet(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

    module = Quiet()
    module.training_step = torch.compile(module.training_step, backend="eager")
    trainer(tmp_path, [exported(tmp_path)]).fit(module, loader())
    assert (tmp_path / "out/merged").is_dir()
    assert "merged outputs apart" not in (tmp_path / "out/adapter/README.md").read_text()
