"""Activations are computed again, and what is trained is what is trained without."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from helpers.models import tiny_classifier, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_lora import LoRA
from lightning_lora.callbacks import ActivationCheckpointing
from lightning_lora.pretrained import without_weights
from lightning_lora.trainer.memory import estimate, fake_tensors

IDS = torch.randint(0, 60, (6, 8), generator=torch.Generator().manual_seed(0))


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def tiny_vision() -> nn.Module:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        attention_dropout=0.2,
    )  # fmt: skip
    return CLIPVisionModel(config)


def language(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def pictures(model: Any, ids: Tensor) -> Tensor:
    pixels = ids[:, :1, None, None].expand(-1, 3, 16, 16) / 60
    loss: Tensor = model(pixel_values=pixels).pooler_output.square().mean()
    return loss


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "llama": (lambda: tiny_llama(attention_dropout=0.3), language),
    "encoder": (tiny_classifier, lambda model, ids: model(input_ids=ids, labels=ids[:, 0] % 2).loss),
    "encoder and decoder": (tiny_t5, language),
    "pictures": (tiny_vision, pictures),
}


class Task(L.LightningModule):
    def __init__(self, model: nn.Module, loss: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(IDS, batch_size=3)  # type: ignore[arg-type]


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    lora = LoRA(r=2, lora_dropout=0.2, target_modules="all-linear", merge=None, summary=False)
    return L.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, callbacks=[lora, *callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def trained(kind: str, *callbacks: L.Callback) -> tuple[Any, dict[str, Tensor]]:
    make, loss = MODELS[kind]
    module = Task(make().train(), loss)
    torch.manual_seed(1)
    trainer(*callbacks).fit(module)
    return module.model, {name: p for name, p in module.named_parameters() if "lora" in name}


@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(sorted(MODELS)))
def test_what_is_trained_is_the_same(kind: str) -> None:
    model, expected = trained(kind)
    seen = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(any(getattr(each, "gradient_checkpointing", False) for each in pl_module.modules()))

    again, found = trained(kind, ActivationCheckpointing(), Looks())
    assert seen == [True] * 4
    assert any(p.any() for name, p in expected.items() if "lora_B" in name)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-6)
    # It is as it came.
    assert not any(getattr(each, "gradient_checkpointing", False) for each in again.modules())
    assert [len(each._forward_hooks) for each in again.modules()] == [
        len(each._forward_hooks) for each in model.modules()
    ]


def test_a_model_that_does_so_already_is_left_as_it_is() -> None:
    model: Any = tiny_llama()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    function = model.model.layers[0]._gradient_checkpointing_func
    trainer(ActivationCheckpointing()).fit(Task(model.train(), language))
    assert model.model.layers[0].gradient_checkpointing
    assert model.model.layers[0]._gradient_checkpointing_func is function


def test_it_is_switched_off_after_an_error() -> None:
    def fails(model: Any, ids: Tensor) -> Tensor:
        raise RuntimeError("in the step")

    model: Any = tiny_llama().train()
    with pytest.raises(RuntimeError, match="in the step"):
        trainer(ActivationCheckpointing()).fit(Task(model, fails))
    assert not model.model.layers[0].gradient_checkpointing


def test_memory_is_foreseen_with_it() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4
    )
    found = []
    for callbacks in ([], [ActivationCheckpointing()]):
        with without_weights(), fake_tensors() as fakes:
            module = Task(LlamaForCausalLM(config).train(), language)
            found.append(estimate(trainer(*callbacks), module, None, fakes).activations)
    assert found[1] < 0.4 * found[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "Found no model of transformers in Task"),
        (
            ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
            "Found ResNetModel, whose blocks cannot",
        ),
    ],
)
def test_what_cannot_do_so_is_refused_before_training(model: nn.Module, words: str) -> None:
    assert not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing
    with pytest.raises(ValueError, match=words):
        L.Trainer(
            accelerator="cpu", max_steps=1, callbacks=[ActivationCheckpointing()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(Task(model, lambda *_: torch.zeros(())))  # fmt: skip
