"""What is computed again in the backward pass has the adapters of its forward pass, whichever are active by then."""

import copy
import pickle
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers.models import tiny_llama
from helpers.toys import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lora import LoRA, LoraConfig, adapters_for, add_adapter, disabled, eject, inject, set_adapter

IDS = torch.randint(0, 64, (3, 5), generator=torch.Generator().manual_seed(0))


def by_transformers(model: Any, reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})


def by_wrappers(model: Any, reentrant: bool) -> None:
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for place, block in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(block, implementation)


WAYS = {"transformers": by_transformers, "wrappers": by_wrappers}
CHOICES: list[Any] = ["a", "b", ["a", "b"], None, "disabled", ("a", "b", None), ("b", "b", "a")]


def two_adapters(way: str | None, reentrant: bool, first: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_llama().double().train()
    if way is not None and first:
        WAYS[way](model, reentrant)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    inject(model, config, "a")
    add_adapter(model, config, "b")
    set_adapter(model, ["a", "b"])
    randomize(model, 0.3)
    if way is not None and not first:
        WAYS[way](model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    return model


def loss_of(model: Any, choice: Any, scale: float) -> Tensor:
    with ExitStack() as stack:
        if choice == "disabled":
            stack.enter_context(disabled(model))
        elif isinstance(choice, tuple):
            stack.enter_context(adapters_for(model, choice))
        else:
            set_adapter(model, choice)
        loss: Tensor = scale * model(IDS, labels=IDS, use_cache=False).loss
        return loss


def gradients(model: Any, choices: list[Any], last: Any) -> dict[str, Tensor | None]:
    loss = sum((loss_of(model, choice, scale) for scale, choice in enumerate(choices, 1)), torch.zeros(()))
    set_adapter(model, last)
    if loss.requires_grad:
        loss.backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora" in name
    }


@settings(max_examples=30, deadline=None)
@given(
    way=st.sampled_from(sorted(WAYS)),
    reentrant=st.booleans(),
    first=st.booleans(),
    choices=st.lists(st.sampled_from(CHOICES), min_size=1, max_size=3),
    last=st.sampled_from(["a", "b", None]),
)
def test_gradients_are_those_without_checkpointing(
    way: str, reentrant: bool, first: bool, choices: list[Any], last: Any
) -> None:
    expected = gradients(two_adapters(None, reentrant), choices, last)
    found = gradients(two_adapters(way, reentrant, first), choices, last)
    assert any(gradient is not None and gradient.any() for gradient in expected.values()) or not any(
        choice in ("a", "b", ["a", "b"]) or isinstance(choice, tuple) for choice in choices
    )
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None)
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


class Mixed(L.LightningModule):
    """Each sample with its own adapter, in a context that is over when Lightning calls the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with adapters_for(self, ["a", None, "b"]):
            mixed: Tensor = self.model(batch, labels=batch, use_cache=False).loss
        set_adapter(self, "b")
        loss: Tensor = mixed + self.model(batch, labels=batch, use_cache=False).loss
        set_adapter(self, ["a", "b"])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([IDS, IDS.flip(0)], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_several_adapters(way: str) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model: Any = tiny_llama().train()
        if checkpointed:
            WAYS[way](model, False)
        module = Mixed(model)
        callbacks: list[Any] = [
            LoRA(r=2, target_modules=["q_proj"], adapter_name=name, merge=None, summary=False) for name in ("a", "b")
        ]
        L.Trainer(
            accelerator="cpu", max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module)  # fmt: skip
        found.append([p for name, p in module.named_parameters() if "lora_B" in name])
        functions = [vars(each).get("_gradient_checkpointing_func") for each in module.modules()]
        assert all(each is None or each.func is checkpoint for each in functions)
    assert all(p.any() for p in found[0])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_copies_compute_again_with_their_own(way: str) -> None:
    model = two_adapters(way, False)
    set_adapter(model, "a")
    expected = gradients(two_adapters(None, False), ["a", "b"], None)
    copies = [copy.deepcopy(model)]
    if way == "wrappers":  # a hook of transformers' cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for again in copies:
        found = gradients(again, ["a", "b"], None)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)
        assert all(p.grad is None for p in model.parameters())


def test_the_function_is_the_model_s_own_again() -> None:
    model: Any = tiny_llama()
    own = partial(checkpoint, use_reentrant=False)
    model._set_gradient_checkpointing(True, own)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with disabled(model):
        assert model.model.layers[0]._gradient_checkpointing_func is not own
    eject(model)
    assert model.model.layers[0]._gradient_checkpointing_func is own
