"""What a run is said to take, beside what it takes."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import lightning as L
import pytest
import torch
from helpers import quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from lightning_lora import LoRA
from lightning_lora.fake_tensors import has_values
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.pretrained import without_weights
from lightning_lora.tasks import CausalLM, causal_lm
from lightning_lora.trainer.memory import MemoryEstimate, estimate, fake_tensors

QUANTIZED = [{"quantize": kind} for kind in ("nf4", "nf4-dq", "int8") if find_spec("bitsandbytes")]
# What a processor's kernels for bfloat16 take for themselves, each thread of them, is not foreseen.
ROOM = {torch.float32: 0.02, torch.bfloat16: 0.07}
Build = Callable[[], L.LightningModule]


class Mlp(L.LightningModule):
    def __init__(self, hidden: int, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch).float(), batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=1e-3)


class Data(L.LightningDataModule):
    def __init__(self, *batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(list(self.batches), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


class Measured(Callback):
    """The peak of the second step: what is there before, and what it allocates."""

    peak = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            packed = {id(weight): storage.size(layer, weight) for _, layer, storage, weight in quantized_layers(module)}
            states = [
                value
                for optimizer in trainer.optimizers
                for state in optimizer.state.values()
                for value in state.values()
            ]
            inputs = batch.values() if isinstance(batch, dict) else [batch]
            tensors = [*module.parameters(), *module.buffers(), *states, *inputs]
            self.peak = sum(packed.get(id(tensor), tensor.nbytes) for tensor in tensors)
            self.stack = ExitStack()
            self.allocations = self.stack.enter_context(harness.counted())
            # Anew, since the profiler sees no end of what was made before it.
            self.before = [parameter.grad for parameter in module.parameters()]
            for parameter, grad in zip(module.parameters(), self.before):
                parameter.grad = None if grad is None else grad.clone()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.stack.close()
            self.peak += max(itertools.accumulate(self.allocations))


def make_trainer(precision: str, *callbacks: Callback, r: int = 8, accumulate: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoRA(r=r, summary=False, target_modules="all-linear", merge=None), *callbacks],
    )


def both(build: Build, batch: Any, precision: str = "32-true", **options: Any) -> tuple[MemoryEstimate, int]:
    """What is said, and the measured peak."""
    found = foreseen(build, batch, precision, **options)
    measured, threads = Measured(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make_trainer(precision, measured, **options).fit(build(), datamodule=Data(batch, batch))
    finally:
        torch.set_num_threads(threads)
    return found, measured.peak


def room(precision: str, dtype: str = "float32", **_: Any) -> float:
    return ROOM[torch.float32 if (precision, dtype) == ("32-true", "float32") else torch.bfloat16]


def foreseen(build: Build, batch: Any, precision: str = "32-true", **options: Any) -> MemoryEstimate:
    with without_weights(), fake_tensors() as fakes:
        return estimate(make_trainer(precision, **options), build(), Data(batch), fakes)


@settings(max_examples=6, deadline=None)
@given(
    hidden=st.integers(64, 300),
    rows=st.integers(16, 500),
    r=st.integers(1, 16),
    precision=st.sampled_from(["32-true", "bf16-mixed"]),
    optimizer=st.sampled_from([torch.optim.AdamW, torch.optim.SGD]),
)
def test_a_plain_module(hidden: int, rows: int, r: int, precision: str, optimizer: type[torch.optim.Optimizer]) -> None:
    found, peak = both(lambda: Mlp(hidden, optimizer), torch.randn(rows, hidden), precision, r=r)
    assert found.peak == pytest.approx(peak, rel=room(precision))
    trained = 4 * r * 2 * 3 * hidden
    assert (found.adapters, found.gradients, found.others) == (trained, trained, 0)
    assert found.frozen == 4 * (4 * hidden**2 + 3 * hidden)
    assert found.moments == (2 * trained + 4 * 4 if optimizer is torch.optim.AdamW else 0)
    assert found.resting + found.gradients_at_peak + found.activations == found.peak


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


class Checkpointed(CausalLM):
    def build(self, dtype: torch.dtype) -> Any:
        model = super().build(dtype)
        model.gradient_checkpointing_enable()
        return model


def text(packed: bool = False) -> dict[str, Tensor]:
    """Four rows of 32 tokens, half of them learned; or two in each."""
    ids = torch.randint(0, 512, (4, 32))
    labels = ids.clone()
    labels[:, :16] = -100
    beside = {"position_ids": torch.arange(16).repeat(4, 2)} if packed else {"attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "labels": labels, **beside}


def check_a_language_model(
    llama: str, task: type[CausalLM], options: dict[str, Any], precision: str, packed: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_lm, "load_tokenizer", lambda *_: None)
        found, peak = both(lambda: task(llama, **options), text(packed), precision)
    assert found.peak == pytest.approx(peak, rel=room(precision, **options))
    assert found.activations > 0.1 * peak


@settings(max_examples=8, deadline=None)
@given(
    task=st.sampled_from([CausalLM, Checkpointed]),
    options=st.sampled_from([{}, {"dtype": "bfloat16"}, *QUANTIZED]),
    precision=st.sampled_from(["32-true", "bf16-mixed"]),
    packed=st.booleans(),
)
def test_a_language_model(
    llama: str, task: type[CausalLM], options: dict[str, Any], precision: str, packed: bool
) -> None:
    check_a_language_model(llama, task, options, precision, packed)


@quantized.needs("bitsandbytes")
@pytest.mark.parametrize(("kind", "precision"), [("nf4-dq", "bf16-mixed"), ("int8", "32-true")])
def test_what_is_computed_anew_on_a_quantized_base(llama: str, kind: str, precision: str) -> None:
    check_a_language_model(llama, Checkpointed, {"quantize": kind}, precision, True)


def test_gradients_are_kept_beside_those_of_the_next_micro_batch() -> None:
    build, batch = lambda: Mlp(128), torch.randn(64, 128)
    one, several = foreseen(build, batch), foreseen(build, batch, accumulate=2)
    assert several.gradients == one.gradients
    assert several.gradients_at_peak >= one.gradients_at_peak


def test_the_largest_rows_are_one_batch() -> None:
    rows = [torch.randn(2 + index % 7, 32) for index in range(20)]

    class Rows(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(rows, batch_size=2, collate_fn=lambda given: torch.cat(given))  # type: ignore[arg-type]

    with fake_tensors() as fakes:
        found = estimate(make_trainer("32-true"), Mlp(32), Rows(), fakes)
    assert found.batch == "the 2 largest of 20 rows, 16x32"


def test_parameters_have_no_values_and_leave_no_trace_in_torch() -> None:
    with fake_tensors() as fakes:
        module = Mlp(4096)
        assert fakes.live == 4 * (4 * 4096**2 + 3 * 4096)
        assert not any(has_values(parameter) for parameter in module.parameters())
    assert all(has_values(parameter) for parameter in Mlp(4).parameters())


class Choosing(Mlp):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out = self.net(batch)
        return out[out > 0].sum()


def test_a_step_that_asks_for_values_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs values, .* --trainer.max_steps 2"):
        foreseen(lambda: Choosing(32), torch.randn(8, 32))
