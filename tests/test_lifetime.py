"""Random modules through random lives, beside a float64 reference that knows only ``W + scaling * B A``."""

import copy
import io
import pickle
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from lightning_lora import (
    LoRA,
    LoraConfig,
    active_adapters,
    adapter_state_dict,
    adapters,
    adapters_for,
    add_adapter,
    delete_adapter,
    disabled,
    eject,
    inject,
    load_adapter,
    load_adapter_state_dict,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)

WIDTH, ROWS = 6, 3
NAMES = ("default", "second", "third")


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding(torch.arange(len(x)) % 5)


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.view(len(x), 2, -1)).view(len(x), 2, WIDTH).sum(1)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(len(x), 1, WIDTH).repeat(1, 2, 1)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].sum(1)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.projection.weight, self.projection.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def hooked() -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    linear.register_forward_hook(doubled)
    return linear


BLOCKS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "embedding": Embeds,
    "convolution": Convolves,
    "attention": Attends,
    "reads": Reads,
    "tied": Tied,
    "hooked": hooked,
    "parametrized": lambda: nn.Sequential(weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)),
}


class Chain(nn.Module):
    """Blocks one after the other, some of them several times."""

    def __init__(self, kinds: list[str], order: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BLOCKS[kind]() for kind in kinds])
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for place in self.order:
            x = x + self.blocks[place % len(self.blocks)](x)
        return x


class Reference:
    """The base, and of each adapter the scaling, A and B of each parameter."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.factors: dict[str, dict[str, tuple[float, Tensor, Tensor]]] = {}

    def take(self, model: nn.Module, name: str, scaling: float) -> None:
        """Learn the start of an adapter."""
        found: dict[str, dict[str, Tensor]] = {}
        for full, tensor in model.named_parameters():
            layer, here, inner = full.rpartition(f".lora.{name}.")
            if here:
                parameter, _, factor = inner.rpartition(".")
                found.setdefault(f"{layer}.{parameter or 'weight'}", {})[factor] = tensor.detach().clone()
        self.factors[name] = {of: (scaling, pair["lora_A"], pair["lora_B"]) for of, pair in found.items()}

    def weights(self, names: list[str], factors: dict[str, Any] | None = None) -> dict[str, Tensor]:
        names_of = {name.replace(".", "_"): name for name, _ in self.base.named_parameters(remove_duplicate=False)}
        weights = {name: self.base.get_parameter(name).detach() for name in names_of.values()}
        for name in names:
            for of, (scaling, lora_A, lora_B) in (factors or self.factors)[name].items():
                of = names_of[of.replace(".", "_")]  # as of out_proj.weight, which an attention has as out_proj_weight
                weight = weights[of]
                module = self.base.get_submodule(of.rpartition(".")[0])
                groups = module.groups if isinstance(module, nn.Conv1d) else 1
                parts = zip(lora_B.flatten(1).chunk(groups), lora_A.flatten(1).chunk(groups))
                delta = scaling * torch.cat([part_B @ part_A for part_B, part_A in parts])
                delta = delta.t() if weight.shape == (5, WIDTH) else delta
                weights[of] = weight + delta.reshape(weight.shape)
        return weights

    def __call__(self, x: Tensor, names: list[str], factors: dict[str, Any] | None = None) -> Tensor:
        result: Tensor = torch.func.functional_call(self.base, self.weights(names, factors), (x,), tie_weights=False)
        return result

    def cast(self, with_factors: bool) -> None:
        """Round as a model does that was in float32 for a while."""
        self.base.float().double()
        for name, factors in self.factors.items() if with_factors else ():
            self.factors[name] = {
                of: (scaling, lora_A.float().double(), lora_B.float().double())
                for of, (scaling, lora_A, lora_B) in factors.items()
            }


class Lifetime(RuleBasedStateMachine):
    @initialize(
        kinds=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3),
        order=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        rank=st.integers(1, 3),
        chosen=st.booleans(),
        trained=st.booleans(),
        seed=st.integers(0, 99),
    )
    def start(self, kinds: list[str], order: list[int], rank: int, chosen: bool, trained: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = Chain(kinds, order).double().eval()
        self.reference = Reference(copy.deepcopy(self.model))
        self.x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        self.merged = self.gone = False
        self.compiled: Any = None
        self.settings: dict[str, LoraConfig] = {}
        self.put("default", rank, chosen, trained)

    def config(self, rank: int, chosen: bool) -> LoraConfig:
        targets: Any = "all-linear"
        if chosen:
            kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.MultiheadAttention)
            modules = dict(self.reference.base.named_modules())
            targets = [name for name, m in modules.items() if isinstance(m, kinds) and "." in name]
            targets = [name for name in targets if not is_parametrized(modules[name])]
            targets = [name for name in targets if not name.endswith(("out_proj", "projection"))] or targets
        read = [name for name, _ in self.reference.base.named_parameters() if name.endswith("projection.weight")]
        if chosen and all(name.endswith("projection") for name in targets):
            targets = []
        parameters = read if chosen else None
        # Groups of a convolution divide the rank.
        return LoraConfig(r=2 * rank, lora_alpha=3, target_modules=targets, target_parameters=parameters)

    def put(self, name: str, rank: int, chosen: bool, trained: bool) -> None:
        config = self.config(rank, chosen)
        plain = [type(m).__name__ for m in self.reference.base.modules()]
        if not chosen and not any(kind in plain for kind in ("Linear", "MultiheadAttention")):
            config = self.config(rank, True)
        self.settings[name] = config
        if not adapters(self.model):
            inject(self.model, config, name)
        else:
            add_adapter(self.model, config, name)
        if trained:
            for full, parameter in self.model.named_parameters():
                if f".lora.{name}." in full:
                    nn.init.normal_(parameter, std=0.3)
        self.reference.take(self.model, name, config.lora_alpha / config.r)

    def active(self) -> list[str]:
        return active_adapters(self.model) if not self.gone else self.kept

    def may_step(self, out: Tensor) -> bool:
        """Whether an adapted block has a place in the order, and steps of this size do not diverge."""
        return out.requires_grad and bool(out.detach().abs().max() < 1e3)

    @invariant()
    def computes_the_same(self) -> None:
        expected = self.reference(self.x, self.active())
        for model in (self.model, self.compiled):
            if model is not None:
                torch.testing.assert_close(model(self.x), expected, rtol=1e-9, atol=1e-9)

    @precondition(lambda self: not self.merged and not self.gone and len(self.settings) < len(NAMES))
    @rule(rank=st.integers(1, 3), chosen=st.booleans(), trained=st.booleans(), data=st.data())
    def add(self, rank: int, chosen: bool, trained: bool, data: st.DataObject) -> None:
        before = self.active()
        self.put(next(name for name in NAMES if name not in self.settings), rank, chosen, trained)
        assert self.active() == before
        self.choose(data)

    @precondition(lambda self: not self.merged and not self.gone)
    @rule(data=st.data())
    def choose_others(self, data: st.DataObject) -> None:
        self.choose(data)

    def choose(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.settings)), unique=True))
        set_adapter(self.model, names)
        assert sorted(active_adapters(self.model)) == sorted(names)

    @precondition(lambda self: not self.merged and not self.gone and len(self.settings) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.settings)))
        delete_adapter(self.model, name)
        del self.settings[name], self.reference.factors[name]

    @precondition(lambda self: not self.merged and not self.gone)
    @rule()
    def step(self) -> None:
        names = self.active()
        if not names:
            return
        leaves: dict[str, Any] = {}
        for name in names:
            for of, (scaling, *pair) in self.reference.factors[name].items():
                leaves.setdefault(name, {})[of] = (scaling, *(tensor.requires_grad_() for tensor in pair))
        self.model.zero_grad()
        out = self.model(self.x)
        if not self.may_step(out):
            return
        out.pow(2).mean().backward()
        self.reference(self.x, names, leaves).pow(2).mean().backward()
        trained = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        assert all(".lora." in name for name in trained)
        for name in names:
            for of, (scaling, *pair) in leaves[name].items():
                new = []
                for factor, mine in zip(("lora_A", "lora_B"), pair):
                    theirs = next((p for full, p in trained.items() if self.is_factor(full, of, name, factor)), None)
                    assert (theirs is None) == (mine.grad is None)  # a block may have no place in the order
                    new.append(mine.detach().clone())
                    if theirs is not None:
                        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-8, atol=1e-8)
                        theirs.data.add_(theirs.grad, alpha=-0.01)
                        new[-1] -= 0.01 * mine.grad
                self.reference.factors[name][of] = (scaling, *new)  # type: ignore[assignment]

    @staticmethod
    def is_factor(full: str, of: str, name: str, factor: str) -> bool:
        layer, _, inner = full.partition(f".lora.{name}.")
        parameter = inner.removesuffix(factor).rstrip(".") or "weight"
        return inner.endswith(factor) and f"{layer}.{parameter}" == of

    @precondition(lambda self: not self.gone)
    @rule(mode=st.sampled_from(["none", "no_grad", "inference"]))
    def merge(self, mode: str) -> None:
        self.kept = self.active()
        with {"none": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            merge(self.model)
        self.merged = True

    @rule()
    def unmerge(self) -> None:
        unmerge(self.model)
        self.merged = self.gone = False
        with disabled(self.model):
            torch.testing.assert_close(self.model(self.x), self.reference.base(self.x), rtol=1e-9, atol=1e-9)
        base = self.reference.base.state_dict()
        own = {name: tensor for name, tensor in self.model.state_dict().items() if ".lora." not in name}
        assert own.keys() == base.keys() and all(torch.equal(tensor, base[name]) for name, tensor in own.items())

    @precondition(lambda self: not self.gone)
    @rule()
    def take_out_merged(self) -> None:
        self.kept = self.active()
        eject(self.model.eval(), merge=True)  # whose norms are the user's again, and would move
        assert not any(".lora." in name for name in self.model.state_dict())
        self.merged = self.gone = True

    @precondition(lambda self: not self.merged and not self.gone)
    @rule()
    def take_out_and_put_back(self) -> None:
        state = {name: tensor.clone() for name, tensor in adapter_state_dict(self.model).items()}
        active = self.active()
        set_adapter(self.model, list(self.settings))
        eject(self.model)
        base = self.reference.base.state_dict()
        assert all(torch.equal(tensor, base[name]) for name, tensor in self.model.state_dict().items())
        for name, config in self.settings.items():
            (inject if not adapters(self.model) else add_adapter)(self.model, config, name)  # type: ignore[operator]
        load_adapter_state_dict(self.model, state)
        set_adapter(self.model, active)

    @rule()
    def disable(self) -> None:
        if self.merged:
            with pytest.raises(ValueError, match="merged"), disabled(self.model):
                pass
            return
        with disabled(self.model):
            torch.testing.assert_close(self.model(self.x), self.reference.base(self.x), rtol=1e-9, atol=1e-9)

    @precondition(lambda self: not self.merged and not self.gone)
    @rule(data=st.data())
    def by_sample(self, data: st.DataObject) -> None:
        if any(
            "attention" in name or "projection" in name or "embedding" in name for name, _ in self.model.named_modules()
        ):
            return  # which are read as a whole, or see no sample
        names = data.draw(st.lists(st.sampled_from([None, *self.settings]), min_size=ROWS, max_size=ROWS))
        with adapters_for(self.model, names):
            out = self.model(self.x)
        expected = [self.reference(self.x[[i]], [n] if n else [])[0] for i, n in enumerate(names)]
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-9, atol=1e-9)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch"]))
    def copied(self, how: str) -> None:
        if self.gone:
            return  # a plain model, whose adapter stays with the first
        self.compiled = None
        if any(is_parametrized(module) for module in self.model.modules()):
            how = "deepcopy"  # torch pickles none
        if how == "torch":
            torch.save(self.model, buffer := io.BytesIO())
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)
        else:
            self.model = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: not self.gone and len(self.settings) == 1)
    @rule()
    def saved(self) -> None:
        if any("attention" in name for name, _ in self.model.named_modules()):
            return  # PEFT's format adds the output projection's update twice
        (name,) = self.settings
        with tempfile.TemporaryDirectory() as directory:
            save_adapter(self.model, directory, name)
            opened = load_adapter(copy.deepcopy(self.reference.base), directory)
        torch.testing.assert_close(opened(self.x), self.reference(self.x, [name]), rtol=1e-5, atol=1e-6)

    @rule()
    def cast(self) -> None:
        active = self.active()
        self.model.float()
        if self.merged:  # whose weights are rounded for themselves, and what lies aside with the rest
            expected = self.reference(self.x, active).float()
            torch.testing.assert_close(self.model(self.x.float()), expected, rtol=1e-4, atol=1e-4)
            unmerge(self.model)
        self.model.double()
        self.reference.cast(with_factors=not self.gone)  # else they were not in the model
        self.unmerge()

    @precondition(lambda self: not self.gone)
    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.model.train(train)


class Fitted(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.network(batch).pow(2).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class LongLifetime(Lifetime):
    """With what takes long as well."""

    @rule()
    def compile(self) -> None:
        if not self.gone:
            torch.compiler.reset()
            self.compiled = torch.compile(self.model, backend="eager")

    @precondition(lambda self: not self.merged and not self.gone and len(self.settings) == 1)
    @rule()
    def fit(self) -> None:
        (name,) = self.settings
        set_adapter(self.model, [name])
        if not self.may_step(self.model(self.x)):
            return
        lora = LoRA(config=self.settings[name], module="network", adapter_name=name, merge=None, summary=False)
        trainer = Trainer(
            accelerator="cpu", max_steps=1, callbacks=[lora], logger=False, precision="64-true",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        leaves = {
            of: (scaling, *(tensor.requires_grad_() for tensor in pair))
            for of, (scaling, *pair) in self.reference.factors[name].items()
        }
        self.reference(self.x, [name], {name: leaves}).pow(2).mean().backward()
        trainer.fit(Fitted(self.model), torch.utils.data.DataLoader(self.x, batch_size=len(self.x)))
        self.reference.factors[name] = {
            of: (scaling, *(p.detach() - (0 if p.grad is None else 0.01 * p.grad) for p in pair))
            for of, (scaling, *pair) in leaves.items()
        }
        with tempfile.TemporaryDirectory() as directory:
            trainer.save_checkpoint(f"{directory}/a.ckpt")
            opened = load_adapter(Fitted(copy.deepcopy(self.reference.base)), f"{directory}/a.ckpt")
        torch.testing.assert_close(opened.network(self.x), self.model(self.x))


COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


def test_a_lifetime() -> None:
    run_state_machine_as_test(Lifetime, settings=settings(max_examples=100, stateful_step_count=20, **COMMON))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_lifetimes() -> None:
    run_state_machine_as_test(LongLifetime, settings=settings(max_examples=600, stateful_step_count=40, **COMMON))
