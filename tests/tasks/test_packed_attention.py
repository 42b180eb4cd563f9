"""Attention of packed rows by themselves is that under their mask, and is taken where that mask alone is."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoraConfig, inject
from lightning_lora.data.packing import collate_packs, joined
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.packed_attention import rows_by_themselves

VOCABULARY = 31


class Pairs(TorchFunctionMode):
    """Counts the calls of attention, and the pairs of tokens in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.calls.append(len(query) * query.shape[-2] * key.shape[-2])
        return func(*args, **(kwargs or {}))


def model(kind: str = "Llama", kv_heads: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=4, pad_token_id=0, **options,
    )  # fmt: skip
    made = getattr(transformers, f"{kind}ForCausalLM")(config).double().train()
    return inject(made, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian"))


def batch(packs: list[list[int]]) -> dict[str, Tensor]:
    """Packs of rows of these lengths."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in packs:
        rows = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        made.append(joined({"input_ids": row, "labels": [-100, *row[1:]]} for row in rows))
    return collate_packs(made, pad_token_id=0)


def learned(net: Any, rows: dict[str, Tensor], alone: bool) -> tuple[Tensor, list[Tensor], list[int]]:
    """Loss, gradients and pairs of a step."""
    net.zero_grad()
    with Pairs() as pairs, rows_by_themselves(net, rows["position_ids"]) if alone else nullcontext():
        loss = net(**rows, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None], pairs.calls


lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(lengths, st.sampled_from([("Llama", 1), ("Llama", 4), ("Qwen3", 2), ("Gemma2", 2), ("Mistral", 2)]))
def test_loss_and_gradients_are_those_under_the_mask(packs: list[list[int]], kind: tuple[str, int]) -> None:
    net, rows = model(*kind), batch(packs)
    expected, found = (learned(net, rows, alone) for alone in (False, True))
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-9, atol=1e-12, equal_nan=True)
    assert len(found[1]) == len(expected[1]) > 0


def test_only_the_pairs_of_a_row_are_computed() -> None:
    net, rows = model(), batch([[5, 3, 2], [4, 4]])
    _, _, masked = learned(net, rows, alone=False)
    _, _, alone = learned(net, rows, alone=True)
    assert masked == [2 * 10 * 10] * 2
    assert alone == [25, 9, 4, 16, 16, 4] * 2  # the last is padding


@pytest.mark.parametrize(
    "rows", [batch([[6]]), batch([[5, 3]]) | {"attention_mask": torch.ones(1, 8, dtype=torch.long)}]
)
def test_what_is_not_under_that_mask_is_left(rows: dict[str, Tensor]) -> None:
    net = model()
    assert learned(net, rows, alone=True)[2] == learned(net, rows, alone=False)[2]


def test_a_window_that_hides_pairs_of_a_row_is_left() -> None:
    rows = batch([[6, 3]])
    assert learned(model("Mistral", sliding_window=3), rows, alone=True)[2] == [81, 81]
    assert learned(model("Mistral", sliding_window=9), rows, alone=True)[2] == [36, 9] * 2


def test_models_that_compute_parts_again_are_left() -> None:
    net, rows = model(), batch([[5, 3], [4, 4]])
    expected = learned(net, rows, alone=False)
    net.gradient_checkpointing_enable({"use_reentrant": False})
    found = learned(net, rows, alone=True)
    torch.testing.assert_close(found[:2], expected[:2])
    assert set(found[2]) == {2 * 8 * 8}


def test_a_layer_in_the_wrapper_of_pytorch_is_left() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net, rows = model(), batch([[5, 3], [4, 4]])
    net.model.layers[0] = checkpoint_wrapper(net.model.layers[0], checkpoint_fn=checkpoint, use_reentrant=False)
    assert set(learned(net, rows, alone=True)[2]) == {2 * 8 * 8}


def test_the_task_takes_packed_rows_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    task = CausalLM("unused")
    task.model = model()
    monkeypatch.setattr(task, "log", lambda *args, **options: None)
    with Pairs() as pairs:
        task.training_step(batch([[5, 3], [4, 4]]), 0)
        pairs.calls.clear()  # of the first step, which makes sure that rows are kept apart
        task.training_step(batch([[5, 3], [4, 4]]), 0).backward()
    assert pairs.calls == [25, 9, 16, 16] * 2
