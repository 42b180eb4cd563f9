"""A training step that computes with the weight of an adapted layer is refused, and one that only looks is not."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, prune
from torch.utils.data import DataLoader

from lightning_lora import LoRA, TargetError


class Items(L.LightningModule):
    """A recommender: items are embedded by calls, and what the step makes of their table is given."""

    def __init__(self, use: "Callable[[Items, Tensor], Tensor | float]") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.encoder = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.items(x).mean(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batch = batch
        hidden = self(batch)
        return hidden.square().sum() + self.use(self, hidden)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def scored(hidden: Tensor, table: Tensor) -> Tensor:
    return (hidden @ table.mT).logsumexp(-1).sum()


def under_another_name(module: Items, hidden: Tensor) -> Tensor:
    table = module.items
    return scored(hidden, table.weight)


def without_gradient(module: Items, hidden: Tensor) -> float:
    with torch.no_grad():
        return float(scored(hidden, module.items.weight))


def called_by_forward(module: Items, hidden: Tensor) -> Tensor:
    return module.encoder.forward(hidden).sum()


def switched_off(module: Items, hidden: Tensor) -> Tensor:
    with lightning_lora_disabled(module):
        return scored(hidden, module.items.weight)


def lightning_lora_disabled(module: nn.Module) -> Any:
    from lightning_lora import disabled

    return disabled(module)


COMPUTES: dict[str, Callable[[Items, Tensor], Any]] = {
    "product": lambda m, h: scored(h, m.items.weight),
    "another name": under_another_name,
    "detached": lambda m, h: scored(h, m.items.weight.detach()),
    "cast": lambda m, h: scored(h.double(), m.items.weight.double()),
    "normalized": lambda m, h: scored(h, F.normalize(m.items.weight)),
    "rows": lambda m, h: (h * m.items.weight[0]).sum(),
    "stacked": lambda m, h: scored(h, torch.cat([m.items.weight, m.items.weight])),
    "functional": lambda m, h: F.linear(h, m.encoder.weight).sum(),
    "data without a gradient": lambda m, h: (m.batch[:, :1].float().expand(-1, 4) @ m.items.weight.mT).mean(),
    "a target": lambda m, h: torch.cdist(m.batch[:, :1].float().expand(-1, 4), m.encoder.weight).sum(),
    "what was computed before": lambda m, h: (h.detach() @ m.encoder.weight).square().sum(),
    "of a parameter and data": lambda m, h: scored(h, m.encoder.lora["default"].lora_A.mean() * m.items.weight),
}
LOOKS: dict[str, Callable[[Items, Tensor], Any]] = {
    "logged": lambda m, h: m.log("norm", m.items.weight.norm()) or 0.0,
    "dtype": lambda m, h: h.to(m.items.weight.dtype).type_as(m.items.weight).to(m.items.weight).sum(),
    "shape": lambda m, h: (h + torch.zeros_like(m.encoder.weight).sum() + m.items.weight.new_ones(4)).sum(),
    "no gradient": without_gradient,
    "forward": called_by_forward,
    "disabled": switched_off,
    "a parameter of it": lambda m, h: (h * nn.Parameter(m.encoder.weight.data.clone())[0]).sum(),
    "bias": lambda m, h: (h * m.encoder.bias).sum(),
}
PENALTIES: dict[str, Callable[[Items, Tensor], Any]] = {
    "norm": lambda m, h: m.items.weight.norm(),
    "each": lambda m, h: 0.1 * sum(p.square().sum() for p in m.parameters()),
    "orthogonality": lambda m, h: (m.encoder.weight @ m.encoder.weight.mT - torch.eye(4)).square().sum(),
    "one vector": lambda m, h: 0.1 * parameters_to_vector(m.parameters()).norm(),
    "one vector of less": lambda m, h: torch.cat([p.flatten() for p in m.encoder.parameters()]).abs().mean(),
    "all norms": lambda m, h: torch.stack(torch._foreach_norm(list(m.parameters()))).norm(),
    "from a start": lambda m, h: sum((p - p.detach().clone().zero_()).square().sum() for p in m.parameters()),
    "a running sum": lambda m, h: torch.zeros(1).add_(m.encoder.weight.abs().sum()).squeeze(),
    "a scale": lambda m, h: (h * m.encoder.weight.std()).sum(),
}


def fit(path: Path, module: L.LightningModule, **settings: Any) -> None:
    lora = LoRA(**{"r": 2, "target_modules": ["items", "encoder"], "merge": None, "summary": False, **settings})
    data = DataLoader(torch.arange(12).remainder(10).view(4, 3), batch_size=2)
    toys.trainer(path, [lora], max_steps=3).fit(module, data)


class Helped(toys.Toy):
    """A forward that hands its layers to functions, which read their weights, and calls only the last one."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.read(self.hidden, x))


def in_turn(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = F.linear(x, layer.weight, layer.bias).relu()
    return x


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize(
    "read", [in_turn, lambda layers, x: (x.unsqueeze(-2) @ torch.stack([layer.weight for layer in layers])[0]).mean(-2)]
)
def test_weights_that_are_read_before_anything_needs_a_gradient(read: Any, start: Any, tmp_path: Path) -> None:
    """Their values first meet a gradient inside of a layer that is adapted itself."""
    lora = LoRA(r=1, target_modules=["hidden", "last"], init_lora_weights=start, summary=False)
    with pytest.raises(TargetError, match=r"computes with 'hidden\.0\.weight'"):
        toys.trainer(tmp_path, [lora]).fit(Helped(read), toys.loader())
    toys.trainer(tmp_path, [LoRA(r=1, target_modules=["last"], summary=False)]).fit(Helped(read), toys.loader())


def reads_encoder(use: str) -> bool:
    return use in ("functional", "a target", "what was computed before")


@pytest.mark.parametrize("use", COMPUTES)
def test_what_computes_with_the_weight_is_refused_before_a_step(use: str, tmp_path: Path) -> None:
    module = Items(COMPUTES[use])
    with pytest.raises(TargetError, match=r"training step computes with '(items|encoder)\.weight'.*exclude_modules"):
        fit(tmp_path, module)
    assert not module.encoder.lora["default"].lora_B.any()  # type: ignore[union-attr, operator, index]
    assert not torch.overrides._get_current_function_mode_stack()
    fit(tmp_path, Items(COMPUTES[use]), target_modules=["items" if reads_encoder(use) else "encoder"])


@pytest.mark.parametrize("use", LOOKS)
def test_what_looks_at_the_weight_trains(use: str, tmp_path: Path) -> None:
    module = Items(LOOKS[use])
    fit(tmp_path, module)
    assert module.encoder.lora["default"].lora_B.any()  # type: ignore[union-attr, operator, index]
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("use", PENALTIES)
def test_a_penalty_on_weights_trains_and_is_told_to_be_a_constant(use: str, tmp_path: Path) -> None:
    module = Items(PENALTIES[use])
    with pytest.warns(UserWarning, match=r"A value of '(items|encoder)\.weight' alone is in the loss"):
        fit(tmp_path, module)
    assert module.encoder.lora["default"].lora_B.any()  # type: ignore[union-attr, operator, index]
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_penalty_on_what_is_trained_is_no_reading(tmp_path: Path) -> None:
    fit(tmp_path, Items(lambda m, h: parameters_to_vector([p for p in m.parameters() if p.requires_grad]).norm()))


class Drawing(Items):
    """Takes its batches itself, so that nothing tells which tensors are data."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return super().training_step(batch, 0)


@pytest.mark.parametrize("use", COMPUTES)
def test_data_that_the_step_draws_itself(use: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="beside calling the layer"):
        fit(tmp_path, Drawing(COMPUTES[use]))
    with pytest.warns(UserWarning, match="alone is in the loss"):
        fit(tmp_path, Drawing(PENALTIES["one vector"]))


@pytest.mark.parametrize("put_on", [prune.identity, prune.random_unstructured, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*was computed of others")
def test_a_tensor_in_the_memory_of_a_computed_weight_is_not_that_weight(put_on: Any, tmp_path: Path) -> None:
    class PutOn(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for layer in (pl_module.encoder, pl_module.items):
                put_on(layer, "weight", **{"amount": 1} if put_on is prune.random_unstructured else {})

    def many(module: Items, hidden: Tensor) -> Tensor:
        made = [torch.ones(4) for _ in range(20_000)]
        return torch.stack([(hidden * each).sum() for each in made[::10]]).sum() + (hidden * torch.stack(made)[0]).sum()

    module = Items(many)
    lora = LoRA(r=2, target_modules=["items", "encoder"], merge=None, summary=False)
    data = DataLoader(torch.arange(12).remainder(10).view(4, 3), batch_size=2)
    toys.trainer(tmp_path, [lora, PutOn()], max_steps=2).fit(module, data)
    assert module.encoder.lora["default"].lora_B.any()  # type: ignore[union-attr, operator, index]


@settings(max_examples=15)
@given(
    looks=st.lists(st.sampled_from(sorted(LOOKS)), max_size=3),
    penalties=st.lists(st.sampled_from(sorted(PENALTIES)), max_size=2),
    computes=st.lists(st.sampled_from(sorted(COMPUTES)), max_size=1),
)
@pytest.mark.filterwarnings("ignore:A value of .* alone is in the loss")
def test_any_of_them_together(
    looks: list[str], penalties: list[str], computes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    uses = [
        *(LOOKS[name] for name in looks),
        *(PENALTIES[name] for name in penalties),
        *(COMPUTES[name] for name in computes),
    ]
    module = Items(lambda m, h: sum(use(m, h) for use in uses))
    path = tmp_path_factory.mktemp("run")
    if computes:
        with pytest.raises(TargetError, match="beside calling the layer"):
            fit(path, module)
    else:
        fit(path, module)


def test_tied_layers_and_an_error_in_the_step(tmp_path: Path) -> None:
    def fails(module: Items, hidden: Tensor) -> Tensor:
        raise KeyError("mine")

    class Tied(Items):
        def __init__(self) -> None:
            super().__init__(lambda m, h: m.head(h).sum())
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.items.weight

    with pytest.raises(KeyError, match="mine"):
        fit(tmp_path, Items(fails))
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.warns(UserWarning, match="is tied to 'head.weight'"):
        fit(tmp_path, Tied())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_part_computes_the_same_beside_it(backend: str, tmp_path: Path) -> None:
    compiled = torch.compile(lambda hidden: hidden.sin().sum(), backend=backend)
    weights = []
    for part in (compiled, lambda hidden: hidden.sin().sum()):
        module = Items(lambda m, h, part=part: part(h))
        fit(tmp_path, module)
        weights.append(module.encoder.lora["default"].lora_B)  # type: ignore[union-attr, operator, index]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("how", ["a part, by torch.compile", "a part, by its own compile", "all, in the Trainer"])
def test_where_something_is_compiled_nothing_looks_on(how: str, tmp_path: Path) -> None:
    """A second compilation, for a step that is not looked at, can take minutes."""
    looking: list[int] = []

    def use(module: Items, hidden: Tensor) -> float:
        looking.append(len(torch.overrides._get_current_function_mode_stack()))
        return 0.0

    module: Any = Items(use)
    if how == "a part, by torch.compile":
        module.encoder = torch.compile(module.encoder, backend="eager")
    elif how == "a part, by its own compile":
        module.encoder.compile(backend="eager")
    else:
        module.use = torch.compiler.disable(use)
        module = torch.compile(module, backend="eager")
    fit(tmp_path, module)
    assert looking == [0, 0, 0]


def test_a_callback_is_copied_without_its_run(tmp_path: Path) -> None:
    lora = LoRA(r=2, target_modules=["items", "encoder"], summary=False)
    copies: list[LoRA] = []

    class Copies(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert lora._watches.reads is not None  # this one comes first, so while the first batch is watched
            copies.append(copy.copy(lora))

    data = DataLoader(torch.arange(12).remainder(10).view(4, 3), batch_size=2)
    toys.trainer(tmp_path, [Copies(), lora], max_steps=1).fit(Items(LOOKS["logged"]), data)
    (watches,) = [dataclasses.astuple(each._watches) for each in copies]
    assert watches == (None,) * 5
