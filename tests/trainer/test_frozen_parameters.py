"""Optimizers lose frozen parameters, and are then as if they had been given the trained ones alone."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.toys import Toy, assert_same_tensors, loader, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import LoRA, LoraConfig, inject
from lightning_lora.trainer.frozen_parameters import drop_frozen, held_by

CLASSES: dict[str, type[Optimizer]] = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
}
VARIANTS = [
    (name, variant)
    for name, cls in CLASSES.items()
    for variant in ("", "foreach", "fused", "capturable", "amsgrad", "momentum")
    if not variant or variant in inspect.signature(cls).parameters
]


class CollectsAtOnce(Optimizer):
    """Makes its state in the constructor, as some optimizers of other packages do."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        for parameter in held_by(self):
            self.state[parameter]["mean"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter]["mean"].lerp_(parameter.grad, 0.1)
                    parameter.sub_(mean.sign(), alpha=group["lr"])
        return loss


class Wraps(Optimizer):
    """Holds another optimizer, with its groups, and a slow mean of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__([{**group, "params": list(group["params"])} for group in optimizer.param_groups], {})
        for parameter in held_by(self):
            self.state[parameter]["slow"] = parameter.detach().clone()

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for parameter in held_by(self):
                parameter.copy_(self.state[parameter]["slow"].lerp_(parameter, 0.5))
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["inner"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "inner"})


class LooksAhead(Wraps):
    """Keeps its slow weights in lists beside the groups."""

    def __init__(self, optimizer: Optimizer, kind: type = list, by_group: bool = True) -> None:
        super().__init__(optimizer)
        slow = [kind(p.detach().clone() for p in group["params"]) for group in optimizer.param_groups]
        self.slow = slow if by_group else kind(weight for weights in slow for weight in weights)

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        lists = self.slow if len(self.slow) == len(self.param_groups) else [self.slow]
        slow = [weight for weights in lists for weight in weights]
        with torch.no_grad():
            for parameter, weight in zip(held_by(self), slow, strict=True):
                parameter.copy_(weight.add_(parameter - weight, alpha=0.5))
        return loss


class Trains(Toy):
    def __init__(self, optimizer: Callable[[list[tuple[str, nn.Parameter]]], Any]) -> None:
        super().__init__()
        self.make = optimizer

    def configure_optimizers(self) -> Any:
        return self.make(list(self.named_parameters()))

    def on_train_start(self) -> None:
        optimizer = self.optimizers()
        if hasattr(optimizer, "train"):  # of schedulefree
            optimizer.train()


def require_resumable(tmp_path: Path, optimizer: Callable[[list[tuple[str, nn.Parameter]]], Any]) -> dict[str, Any]:
    """Train, save and resume, and give the state of the optimizer that was saved."""
    lora: dict[str, Any] = {"r": 2, "merge": None, "summary": False}
    run: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2}
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = Trains(optimizer), Trains(optimizer)
    base = snapshot(whole)
    L.seed_everything(3, verbose=False)
    toys.trainer(tmp_path, [LoRA(**lora), checkpoints], **run).fit(whole, loader())
    path = tmp_path / "epoch=0.ckpt"
    toys.trainer(tmp_path, [LoRA(**lora)], **run).fit(resumed, loader(), ckpt_path=path)
    assert_same_tensors(snapshot(resumed), snapshot(whole))
    assert_same_tensors(toys.base_of(whole, base), base)
    assert any(tensor.any() for name, tensor in snapshot(whole).items() if name.endswith("lora_B"))
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
    trained = [p for p in whole.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in saved["param_groups"]) == len(trained)
    assert set(saved["state"]) <= set(range(len(trained)))
    return saved


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_optimizer_of_torch(tmp_path: Path, name: str, variant: str) -> None:
    if name == "SparseAdam":
        pytest.skip("takes sparse gradients alone, which adapters do not have: see the property below")
    settings: dict[str, Any] = {variant: 0.9 if variant == "momentum" else True} if variant else {}
    matrix = nn.Parameter(torch.ones(2, 2))
    try:  # plain, as without LoRA
        optimizer = CLASSES[name]([matrix], lr=1e-2, **settings)  # type: ignore[call-arg]
        matrix.square().sum().backward()
        optimizer.step(lambda: matrix.sum())  # type: ignore[arg-type, return-value]
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"torch does not do so on the CPU: {str(error)[:80]}")

    def make(named: list[tuple[str, nn.Parameter]]) -> Any:
        matrices = [(name, p) for name, p in named if p.dim() == 2] if name == "Muon" else named
        return CLASSES[name]([p for _, p in matrices], lr=1e-2, **settings)  # type: ignore[call-arg]

    require_resumable(tmp_path, make)


def halves(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    parameters = [parameter for _, parameter in named]
    return [{"params": tuple(parameters[::2]), "lr": 1e-2}, {"params": tuple(parameters[1::2]), "lr": 1e-3}]


OTHERS: dict[str, Callable[[list[tuple[str, nn.Parameter]]], Any]] = {
    "named parameters": lambda named: torch.optim.AdamW(named, lr=1e-2),
    "tuples with several rates": lambda named: torch.optim.Adagrad(halves(named), lr=1e-2),
    "state of the constructor": lambda named: CollectsAtOnce([p for _, p in named]),
    "wrapped": lambda named: Wraps(CollectsAtOnce([p for _, p in named])),
    "wrapped twice": lambda named: Wraps(Wraps(torch.optim.Adagrad(halves(named)))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_ways_to_make_one(tmp_path: Path, kind: str) -> None:
    saved = require_resumable(tmp_path, OTHERS[kind])
    groups = list(saved["param_groups"])
    while "inner" in saved:
        saved = saved["inner"]
        groups += saved["param_groups"]
        assert sum(len(group["params"]) for group in saved["param_groups"]) == 6
        assert set(saved["state"]) <= set(range(6))
    for group in groups:
        assert len(group.get("param_names", group["params"])) == len(group["params"])
        assert all("lora" in name for name in group.get("param_names", ()))


@pytest.mark.parametrize(
    ("package", "name", "settings"),
    [
        ("schedulefree", "AdamWScheduleFree", {}),
        ("schedulefree", "SGDScheduleFree", {}),
        ("lion_pytorch", "Lion", {}),
        *(("bitsandbytes.optim", name, {}) for name in ("Adam8bit", "AdamW8bit", "Lion8bit", "Adagrad8bit")),
        ("bitsandbytes.optim", "SGD8bit", {"momentum": 0.9}),
    ],
)
def test_optimizers_of_other_packages(tmp_path: Path, package: str, name: str, settings: dict[str, Any]) -> None:
    module = pytest.importorskip(package, reason="an optimizer of another package, which no extra installs")
    cls = getattr(module, name)
    require_resumable(tmp_path, lambda named: cls([p for _, p in named], lr=1e-2, **settings))


@settings(max_examples=8)
@given(kind=st.sampled_from([list, tuple]), by_group=st.booleans(), lbfgs=st.booleans())
def test_lists_beside_the_groups(kind: type, by_group: bool, lbfgs: bool) -> None:
    def trained(give: Callable[[list[nn.Parameter]], list[nn.Parameter]]) -> dict[str, Tensor]:
        model = inject(Toy(), LoraConfig(r=2, seed=1)).eval()
        parameters = give(list(model.parameters()))
        first = set(model.net[0].parameters())
        halves = [[p for p in parameters if (p in first) == is_first] for is_first in (True, False)]
        groups: Any = parameters if lbfgs else [{"params": halves[0]}, {"params": halves[1], "lr": 0.1}]
        inner = torch.optim.LBFGS(groups, lr=0.1) if lbfgs else torch.optim.SGD(groups, lr=0.05)
        optimizer = LooksAhead(inner, kind, by_group)
        drop_frozen([optimizer], model)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model.net(torch.ones(4, 8)).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return snapshot(model)

    assert_same_tensors(trained(lambda every: every), trained(lambda every: [p for p in every if p.requires_grad]))


@pytest.mark.parametrize("by_group", [True, False])
def test_lists_that_were_made_before_the_adapters_are_refused(by_group: bool) -> None:
    model = Toy()
    optimizer = LooksAhead(torch.optim.SGD(model.parameters(), lr=0.05), by_group=by_group)
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match="has made its state of such a list"):
        drop_frozen([optimizer], inject(model, LoraConfig(r=2)))


class Two(Toy):
    """Two optimizers over all parameters, which both hold the adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), 1e-2), CollectsAtOnce(self.parameters(), 1e-3)


def test_the_same_parameters_in_two_optimizers(tmp_path: Path) -> None:
    whole, resumed = Two(), Two()
    L.seed_everything(3, verbose=False)
    checkpoints = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=8, save_top_k=-1)
    toys.trainer(tmp_path, [LoRA(r=2, summary=False), checkpoints], max_steps=16).fit(whole, loader())
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["optimizer_states"]
    assert [len(state["state"]) for state in saved] == [6, 6]
    toys.trainer(tmp_path, [LoRA(r=2, summary=False)], max_steps=16).fit(
        resumed, loader(), ckpt_path=tmp_path / "one.ckpt"
    )
    assert_same_tensors(snapshot(resumed), snapshot(whole))


class Flattens(Optimizer):
    """Makes one tensor of all parameters, of which they become views."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
        views = self.flat.detach().split([p.numel() for p in params])
        for parameter, view in zip(params, views):
            parameter.data = view.view_as(parameter)
        super().__init__([self.flat], {})


class MakesAnew(torch.optim.SGD):
    """Gives new groups to everyone who asks."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 1e-2)
        self.kept = self.__dict__.pop("_groups")

    @property
    def param_groups(self) -> Any:
        if "kept" in vars(self):
            return [{**group, "params": list(group["params"])} for group in self.kept]
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self._groups = groups


class Counts(torch.optim.SGD):
    """Its state is as long as its parameters were in the constructor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 1e-2)
        self.count = len(held_by(self))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rates": [held_by(self)[index].norm() for index in range(self.count)]}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda ps: [Flattens(ps)], "'net.0.weight' lies too, so that it would move the base: .*if p.requires_grad"),
        (lambda ps: [torch.optim.SGD(ps, 1e-2), Flattens(ps)], "'net.0.weight' lies too, so that it would move the"),
        (lambda ps: [MakesAnew(ps)], "cannot be taken out of MakesAnew: it makes its groups or state anew"),
        (lambda ps: [Counts(ps)], "cannot be taken out of Counts: its .* raises IndexError.*if p.requires_grad"),
    ],
)
def test_what_cannot_be_filtered(tmp_path: Path, make: Any, problem: str) -> None:
    model = Two()
    model.configure_optimizers = lambda: make(list(model.parameters()))  # type: ignore[method-assign]
    with pytest.raises((ValueError, RuntimeError), match=problem):
        toys.trainer(tmp_path, [LoRA(r=2, summary=False)]).fit(model, loader())


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[nn.ParameterList, list[bool], Callable[[bool], list[Optimizer]]]:
    """Parameters, which of them are trained, and what makes optimizers of them with their indices."""
    count = draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 3)))
    parameters = nn.ParameterList([torch.randn(3, 2) for _ in range(count)])
    trained = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    plans = []
    for _ in range(draw(st.integers(1, 2))):
        cls = CLASSES[draw(st.sampled_from(sorted(CLASSES)))]
        places = draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count).filter(lambda p: max(p) >= 0))
        if cls is torch.optim.LBFGS:
            places = [0] * count  # it has no groups
        plans.append((cls, places, draw(st.booleans())))

    def make(is_reference: bool) -> list[Optimizer]:
        made = []
        for cls, places, named in plans:
            groups: list[dict[str, Any]] = []
            for place in sorted(set(places) - {-1}):
                indices = [index for index in range(count) if places[index] == place]
                if is_reference:
                    params: list[Any] = [parameters[index] for index in indices if trained[index]]
                else:
                    params = [(f"p{index}", parameters[index]) if named else parameters[index] for index in indices]
                rate = {} if cls is torch.optim.LBFGS else {"lr": 10.0 ** -(place + 1)}
                groups.append({"params": params, **rate})
            made.append(cls(groups))  # type: ignore[arg-type]
        return made

    return parameters, trained, make


@given(optimizers())
def test_it_is_as_if_given_the_trained_ones_alone(drawn: Any) -> None:
    parameters, trained, make = drawn
    found = make(False)
    for parameter, is_trained in zip(parameters, trained):
        parameter.requires_grad_(is_trained)
    expected = make(True)
    start = [parameter.detach().clone() for parameter in parameters]
    wrapped = [LightningOptimizer(optimizer) for optimizer in found]
    if not any(held_by(optimizer) for optimizer in expected):
        with pytest.raises(RuntimeError, match="None of the"):
            drop_frozen(wrapped, parameters)
        return
    drop_frozen(wrapped, parameters)

    def run(these: list[Optimizer]) -> list[Tensor]:
        for parameter, value in zip(parameters, start):
            parameter.data.copy_(value)
            parameter.grad = None
        for step in range(3):
            for optimizer in these:
                if not held_by(optimizer) and isinstance(optimizer, torch.optim.LBFGS):
                    continue

                def closure(optimizer: Optimizer = optimizer, step: int = step) -> Tensor:
                    for parameter in held_by(optimizer):
                        gradient = (parameter.detach() + step).sin()
                        sparse = isinstance(optimizer, torch.optim.SparseAdam)
                        parameter.grad = gradient.to_sparse(1) if sparse else gradient
                    return torch.ones(())

                optimizer.step(closure)
        return [parameter.detach().clone() for parameter in parameters]

    for one, other in zip(found, expected):
        assert [[id(p) for p in group["params"]] for group in one.param_groups] == [
            [id(p) for p in group["params"]] for group in other.param_groups
        ]
        names = {id(parameter): f"p{index}" for index, parameter in enumerate(parameters)}
        for group in one.param_groups:
            assert group.get("param_names") in (None, [names[id(p)] for p in group["params"]])
    assert all(map(torch.equal, run(found), run(expected)))
    for one, other in zip(found, expected):
        saved = one.state_dict()
        assert saved["state"].keys() == other.state_dict()["state"].keys()
        other.load_state_dict(saved)


LAZY = sorted({*CLASSES} - {"Adagrad", "LBFGS", "SparseAdam", "Muon"})


@given(
    name=st.sampled_from(LAZY),
    places=st.lists(st.integers(-1, 2), min_size=8, max_size=8).filter(lambda places: max(places) >= 0),
    named=st.booleans(),
    wraps=st.integers(0, 2),
    head=st.booleans(),
)
def test_adapters_take_the_places_of_weights_in_an_earlier_optimizer(
    name: str, places: list[int], named: bool, wraps: int, head: bool
) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    before = [*model.named_parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [pair if named else pair[1] for pair, at in zip(before, places) if at == place], "lr": 10.0**-place}
        for place in sorted({*places} - {-1})
    ]
    made: Any = CLASSES[name](groups)  # type: ignore[arg-type]
    for _ in range(wraps):
        outer: Any = torch.optim.SGD([nn.Parameter(torch.zeros(1), requires_grad=False)], 1.0)
        outer.inner, outer.param_groups = made, made.param_groups
        made = outer
    inject(model, LoraConfig(r=2, target_modules=["0", "1", "2"], modules_to_save=["3"] if head else None))
    expected: dict[int, set[str]] = {place: set() for place in sorted({*places} - {-1})}
    for (full_name, _), place in zip(before, places):
        layer, _, kind = full_name.partition(".")
        if place >= 0 and layer == "3" and head:
            expected[place].add(full_name)
        elif place >= 0 and layer != "3" and kind == "weight":
            expected[place] |= {f"{layer}.lora.default.lora_A", f"{layer}.lora.default.lora_B"}
    if not any(expected.values()):
        with pytest.raises(RuntimeError, match="None of the"):
            drop_frozen([made], model)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drop_frozen([made], model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in made.param_groups]
    assert [sorted(each) for each in found] == [sorted(each) for each in expected.values()]
    assert [group["lr"] for group in made.param_groups] == [10.0**-place for place in expected]
    assert all(group.get("param_names", each) == each for group, each in zip(made.param_groups, found))


def test_adapters_that_an_optimizer_has_stay_where_they_are() -> None:
    model = inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0", "1"]))
    first = torch.optim.SGD([*model[0].parameters()], 1e-2)
    second = torch.optim.SGD([model[0].weight, model[1].weight], 1e-3)
    drop_frozen([first, second], model)
    assert list(map(id, held_by(first))) == list(map(id, model[0].lora.parameters()))  # type: ignore[union-attr, arg-type]
    assert list(map(id, held_by(second))) == list(map(id, model[1].lora.parameters()))  # type: ignore[union-attr, arg-type]


class ByName(Toy):
    """Chooses what decays by its name, as many scripts do."""

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        groups = [
            {"params": [p for name, p in named.items() if name.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if name.endswith("bias")], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)


def test_an_optimizer_of_lightnings_command_line_and_one_that_chooses_by_name(tmp_path: Path) -> None:
    by_name, by_cli = ByName(), Toy()
    early = torch.optim.AdamW(by_cli.parameters(), lr=1e-2, weight_decay=0.1)
    by_cli.configure_optimizers = lambda: early  # type: ignore[method-assign]
    for model in (by_name, by_cli):
        L.seed_everything(3, verbose=False)
        checkpoints = ModelCheckpoint(tmp_path, filename=type(model).__name__, save_top_k=-1)
        callbacks = [LoRA(r=2, merge=None, summary=False), checkpoints]
        toys.trainer(tmp_path, callbacks, max_epochs=2, limit_train_batches=2).fit(model, loader())
    assert_same_tensors(snapshot(by_name), snapshot(by_cli))
    assert any(tensor.any() for name, tensor in snapshot(by_name).items() if name.endswith("lora_B"))
    resumed = Toy()
    new = torch.optim.AdamW(resumed.parameters(), lr=1e-2, weight_decay=0.1)
    resumed.configure_optimizers = lambda: new  # type: ignore[method-assign]
    path = next(tmp_path.glob("Toy*.ckpt"))
    run: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2}
    toys.trainer(tmp_path, [LoRA(r=2, merge=None, summary=False)], **run).fit(resumed, loader(), ckpt_path=path)
    assert_same_tensors(snapshot(resumed), snapshot(by_cli))
