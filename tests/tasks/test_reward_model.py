"""A reward for each answer, learned from pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.texts import word_checkpoint

from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.data import RewardData
from lightning_lora.tasks import RewardModel

PAIRS: list[dict[str, Any]] = [
    {"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"},
    {"prompt": "w5 w6", "chosen": "w7", "rejected": "w8 w9 w10"},
    {"prompt": "w11", "chosen": "w12 w13", "rejected": "w14 w15"},
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return word_checkpoint(tmp_path / "model")


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return toys.trainer(folder, list(callbacks), enable_checkpointing=False, **options)


def test_loss_is_that_of_bradley_and_terry(tmp_path: Path, checkpoint: str) -> None:
    """On a batch of three pairs of several lengths, each answer of which goes through the model by itself."""
    module = RewardModel(checkpoint)
    module.configure_model()
    module = module.double().eval()
    torch.nn.init.normal_(module.model.score.weight, generator=torch.Generator().manual_seed(1))
    data = RewardData(write(tmp_path, PAIRS), checkpoint, val_fraction=0)
    data.setup("fit")
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(  # type: ignore[method-assign]
        name, float(value.compute() if hasattr(value, "compute") else value)
    )
    batch = data.collate(data.train_rows[:])  # type: ignore[index]
    module.validation_step(batch, 0)
    found = float(module.training_step(batch, 0))

    def reward(question: str, answer: str) -> float:
        ids = data.tokenizer(f"<s> user {question} </s> <s> assistant {answer} </s>")["input_ids"]
        hidden = module.model.model(torch.tensor([ids])).last_hidden_state[0]
        # The tokenizer pads with what ends an answer, so that a model of transformers looks at the token before.
        return float(hidden[-2] @ module.model.score.weight[0])

    margins = [reward(pair["prompt"], pair["chosen"]) - reward(pair["prompt"], pair["rejected"]) for pair in PAIRS]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 3
    assert found == pytest.approx(expected, rel=1e-9) and logged["val_loss"] == pytest.approx(expected, rel=1e-9)
    assert logged["val_margin"] == pytest.approx(sum(margins) / 3, rel=1e-9)
    assert logged["val_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert 0 < sum(margin > 0 for margin in margins) < 3  # so that the accuracy says something


def test_the_chosen_win_and_the_head_is_kept(tmp_path: Path, checkpoint: str) -> None:
    rows = [{"prompt": f"w{i}", "chosen": "w1 w2", "rejected": "w3"} for i in range(20)]
    path = write(tmp_path, rows)
    module = RewardModel(checkpoint, lr=1e-2)
    run = trainer(tmp_path, LoRA(r=4, summary=False, merge=None), max_epochs=3)
    run.fit(module, RewardData(path, checkpoint, batch_size=6))
    assert run.callback_metrics["val_accuracy"] == 1 and run.callback_metrics["val_margin"] > 1
    assert run.callback_metrics["val_loss"] < 0.4
    kept = adapter_state_dict(module)
    assert torch.equal(kept["model.score.weight"], module.model.score.weight)

    asked = write(
        tmp_path,
        [
            rows[0],
            {"prompt": "w1", "completion": "w1 w2"},
            {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}], "label": False},
        ],
        "asked.jsonl",
    )
    batches = run.predict(module, RewardData(path, checkpoint, batch_size=2, predict_path=asked))
    pair, good, bad = [row for batch in batches or [] for row in batch]
    assert pair["chosen"] > pair["rejected"] and good["reward"] > bad["reward"]
    held_out = run.predict(module, RewardData(path, checkpoint))
    assert all(row["chosen"] > row["rejected"] for batch in held_out or [] for row in batch)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "w1", "completion": "w2", "label": True},
            r"line 1, field 'label': found True \(bool\), expected 'ch",
        ),
        ({"prompt": "w1", "completion": "w2"}, "line 1, field 'chosen': found none"),
        ({"prompt": "w1", "chosen": "w2"}, "line 1, field 'rejected': found none"),
    ],
)
def test_rows_without_a_pair_are_not_learned(
    tmp_path: Path, checkpoint: str, row: dict[str, Any], message: str
) -> None:
    data = RewardData(write(tmp_path, [row]), checkpoint, val_fraction=0)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LoRA(r=2, summary=False)).fit(RewardModel(checkpoint), data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1"}, "line 1, field 'completion': found none"),
        ({"prompt": "w1", "chosen": "w2"}, "line 1, field 'rejected': found none"),
        ({"prompt": "w1 " * 40, "completion": "w2"}, "line 1: found a question that leaves no room for an answer in 9"),
    ],
)
def test_rows_that_cannot_be_scored(tmp_path: Path, checkpoint: str, row: dict[str, Any], message: str) -> None:
    data = RewardData("absent", checkpoint, predict_path=write(tmp_path, [row]), max_length=9)
    with pytest.raises(ValueError, match=message):
        data.setup("predict")
