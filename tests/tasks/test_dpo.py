from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.texts import word_checkpoint, word_model

from lightning_lora import BaseAsReference, LoRA
from lightning_lora.data import PreferenceData
from lightning_lora.tasks import DPO
from lightning_lora.tasks.preference_losses import LOSSES, Answers, PreferenceLoss

PAIRS: list[dict[str, Any]] = [
    {"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"},
    {"prompt": "w5 w6", "chosen": "w7", "rejected": "w8 w9 w10"},
    {"prompt": "w11", "chosen": "w12 w13", "rejected": "w14 w15"},
]


def write(folder: Path, rows: list[dict[str, object]]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path, [{"prompt": f"w{i}", "chosen": "w1 w2", "rejected": "w3"} for i in range(20)])


def trainer(tmp_path: Path, callbacks: list[L.Callback], **options: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        **options,  # type: ignore[arg-type]
    )


def test_loss_begins_at_log_2_and_the_chosen_gain(tmp_path: Path, path: str) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    data = PreferenceData(path, checkpoint, batch_size=6)
    callbacks = [LoRA(r=4, summary=False), BaseAsReference()]
    run = trainer(tmp_path, callbacks, max_epochs=3, num_sanity_val_steps=-1)
    seen: list[float] = []

    class Seen(L.Callback):
        def on_train_batch_end(self, _: L.Trainer, __: L.LightningModule, outputs: dict, *___: object) -> None:
            seen.append(float(outputs["loss"]))

    run.callbacks.append(Seen())  # type: ignore[attr-defined]
    module = DPO(checkpoint, beta=0.5, lr=1e-2)
    run.fit(module, data)
    assert seen[0] == pytest.approx(0.693147, abs=1e-5)
    assert seen[-1] < 0.5
    assert run.callback_metrics["val_accuracy"] == 1
    assert run.callback_metrics["val_margin"] > 0
    assert module.reference is None
    before = DPO(checkpoint)
    before.configure_model()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        # The trained model is merged, so that no reference is needed.
        gained = module._log_probabilities(batch) - before._log_probabilities(batch)
    chosen, rejected = gained.chunk(2)
    assert (chosen > rejected).all()


def test_loss_is_that_of_the_paper(tmp_path: Path, path: str) -> None:
    from contextlib import nullcontext

    module = DPO(word_checkpoint(tmp_path / "model"), beta=0.5)
    module.configure_model()
    data = PreferenceData(path, str(tmp_path / "model"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    expected = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        ids, labels = ids[: mask.sum()], labels[: mask.sum()]
        scores = module.model(ids[None]).logits[0].log_softmax(-1)
        expected.append(sum(scores[i - 1, ids[i]] for i in range(1, len(ids)) if labels[i] != -100))
    found = module._log_probabilities(batch)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    module.reference = nullcontext
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    torch.testing.assert_close(module._loss(batch, "val_loss", False), torch.tensor(2.0).log())


NEEDS_REFERENCE = ("dpo", "ipo", "kto")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_that_of_its_paper(loss: PreferenceLoss, tmp_path: Path) -> None:
    """On a batch of three pairs, each answer of which goes through the model by itself, in float64."""
    module = DPO(word_checkpoint(tmp_path / "model"), loss=loss, gamma=0.7, dtype="float64")
    module.configure_model()
    data = PreferenceData(write(tmp_path, PAIRS), str(tmp_path / "model"), val_fraction=0)
    data.setup("fit")
    batch = data.collate(data.train_rows or [])
    base = word_model().double().eval()
    trained = word_model().double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    module.model = trained

    @contextmanager
    def reference() -> Iterator[None]:
        module.model = base
        yield
        module.model = trained

    if loss in NEEDS_REFERENCE:
        module.reference = reference
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value))  # type: ignore
    found = module.eval()._loss(batch, "val_loss", False)

    def log_probabilities(model: Any, question: str, answer: str) -> list[float]:
        asked, ids = (data.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, answer))
        scores = model(torch.tensor([asked + ids])).logits[0].log_softmax(-1)
        return [float(scores[len(asked) + i - 1, token]) for i, token in enumerate(ids)]

    def both(question: Any, answer: Any) -> tuple[list[float], float]:
        parts = f"<s> user {question} </s> <s> assistant", f"{answer} </s>"
        mine = log_probabilities(trained, *parts)
        return mine, sum(mine) - sum(log_probabilities(base, *parts))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in PAIRS]
    zero = max(0.0, sum(both(question, rows[i - 1][1])[1] for i, (question, _) in enumerate(rows)) / len(rows))
    assert zero > 0  # so that KTO's reference point counts
    losses, margins = [], []
    for pair in PAIRS:
        (won, gain_w), (lost, gain_l) = (both(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        mean_w, mean_l = sum(won) / len(won), sum(lost) / len(lost)
        odds_w, odds_l = (math.exp(mean) / (1 - math.exp(mean)) for mean in (mean_w, mean_l))
        losses.append(
            {
                "dpo": -math.log(sigmoid(0.1 * gain_w - 0.1 * gain_l)),
                "ipo": (gain_w - gain_l - 1 / (2 * 0.1)) ** 2,
                "kto": ((1 - sigmoid(0.1 * (gain_w - zero))) + (1 - sigmoid(0.1 * (zero - gain_l)))) / 2,
                "orpo": -mean_w - 0.1 * math.log(sigmoid(math.log(odds_w / odds_l))),
                "simpo": -math.log(sigmoid(2 * mean_w - 2 * mean_l - 0.7)),
            }[loss]
        )
        gained = gain_w - gain_l if loss in NEEDS_REFERENCE else mean_w - mean_l
        margins.append((2 if loss == "simpo" else 0.1) * gained)
    assert float(found) == pytest.approx(sum(losses) / 3, rel=1e-9)
    assert logged["val_margin"] == pytest.approx(sum(margins) / 3, rel=1e-9)
    assert logged["val_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_tells_answers_apart(loss: PreferenceLoss, tmp_path: Path, path: str) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    callbacks = [LoRA(r=4, summary=False), *([BaseAsReference()] if loss in NEEDS_REFERENCE else [])]
    run = trainer(tmp_path, callbacks, max_epochs=3)
    run.fit(DPO(checkpoint, loss=loss, lr=1e-2), PreferenceData(path, checkpoint, batch_size=6))
    assert run.callback_metrics["val_accuracy"] == 1 and run.callback_metrics["val_margin"] > 0


def test_a_sure_answer_has_a_finite_loss() -> None:
    """Where the probability of an answer rounds to one, its odds do not."""
    policy = torch.tensor([0.0, -3.0], requires_grad=True)
    answers = Answers(
        policy, torch.ones(2), torch.zeros(2), torch.zeros(()), torch.tensor([True, False]), torch.ones(2)
    )
    loss, _ = LOSSES["orpo"].compute(answers, 0.1, 0.0)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad is not None and policy.grad.isfinite().all()


SINGLE: list[dict[str, Any]] = [
    {"prompt": "w1", "completion": "w2 w3", "label": True},
    {"prompt": "w5 w6", "completion": "w8 w9 w10", "label": False},
    {"prompt": "w11", "completion": "w12", "label": False},
]


def test_kto_of_single_answers_is_that_of_its_paper(tmp_path: Path) -> None:
    """Equations 7 and 8 on three answers, each of which goes through the model by itself, in float64."""
    module = DPO(
        word_checkpoint(tmp_path / "model"), loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5
    )
    base, trained = word_model().double().eval(), word_model().double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    data = PreferenceData(write(tmp_path, SINGLE), str(tmp_path / "model"), val_fraction=0)
    data.setup("fit")
    batch = data.collate(data.train_rows or [])
    assert batch["desirable"].tolist() == [True, False, False]
    module.model = trained

    @contextmanager
    def reference() -> Iterator[None]:
        module.model = base
        yield
        module.model = trained

    module.reference = reference
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value))  # type: ignore
    found = float(module.eval()._loss(batch, "val_loss", False))

    def gain(question: str, answer: str) -> float:
        asked, ids = (
            data.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (f"<s> user {question} </s> <s> assistant", f"{answer} </s>")
        )
        values = []
        for model in (trained, base):
            scores = model(torch.tensor([asked + ids])).logits[0].log_softmax(-1)
            values.append(sum(float(scores[len(asked) + i - 1, token]) for i, token in enumerate(ids)))
        return values[0] - values[1]

    zero = sum(gain(SINGLE[i]["prompt"], SINGLE[i - 1]["completion"]) for i in range(3)) / 3
    assert zero > 0
    losses, margins = [], []
    for row in SINGLE:
        reward = gain(row["prompt"], row["completion"])
        weight, sign = (1.5, 1) if row["label"] else (0.5, -1)
        losses.append(weight - weight / (1 + math.exp(-0.3 * sign * (reward - zero))))
        margins.append(0.3 * sign * reward)
    assert found == pytest.approx(sum(losses) / 3, rel=1e-9)
    assert logged["val_margin"] == pytest.approx(sum(margins) / 3, rel=1e-9)
    assert logged["val_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)


def test_a_pair_is_a_good_and_a_bad_answer_to_kto(tmp_path: Path) -> None:
    """The loss of pairs is that of the same answers without their pairs, with the same reference point."""
    answers = Answers(*torch.randn(4, 6, dtype=torch.float64), torch.arange(6) < 3, torch.ones(6))
    answers = answers._replace(divergence=torch.tensor(0.3))
    order = torch.randperm(6)
    mixed = Answers(*(value if value.ndim == 0 else value[order] for value in answers))
    paired, single = (LOSSES["kto"].compute(each, 0.1, 0.0)[0] for each in (answers, mixed))
    torch.testing.assert_close(paired[order], single)


def test_single_answers_are_told_apart(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    rows: list[dict[str, object]] = [
        {"prompt": f"w{i}", "completion": "w1 w2" if i % 3 else "w3", "label": bool(i % 3)} for i in range(20)
    ]
    run = trainer(tmp_path, [LoRA(r=4, summary=False), BaseAsReference()], max_epochs=4)
    run.fit(DPO(checkpoint, loss="kto", lr=1e-2), PreferenceData(write(tmp_path, rows), checkpoint, batch_size=5))
    assert run.callback_metrics["val_accuracy"] == 1 and run.callback_metrics["val_margin"] > 0


def test_other_losses_refuse_single_answers(tmp_path: Path) -> None:
    """With file and line before the first step; and in a batch of one's own."""
    checkpoint = word_checkpoint(tmp_path / "model")
    data = PreferenceData(write(tmp_path, [PAIRS[0], *SINGLE]), checkpoint)
    message = r"line 2, field 'label': found True \(bool\), expected 'chosen' and 'rejected'.*\n.*line 3.*\n.*line 4"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [LoRA(r=2, summary=False), BaseAsReference()]).fit(DPO(checkpoint), data)
    with pytest.raises(ValueError, match="Found answers without a pair and loss='dpo', expected pairs, or loss='kto'"):
        DPO(checkpoint).training_step({"desirable": torch.tensor([True])}, 0)
    with pytest.raises(ValueError, match="Found undesirable_weight=0, expected a positive number"):
        DPO(checkpoint, loss="kto", undesirable_weight=0)


def test_kto_needs_another_question(tmp_path: Path, path: str) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    module, data = DPO(checkpoint, loss="kto"), PreferenceData(path, checkpoint, batch_size=1)
    with pytest.raises(ValueError, match="Found loss='kto' and batch_size=1, expected two rows or more"):
        trainer(tmp_path, [LoRA(r=2, summary=False), BaseAsReference()]).fit(module, data)
    with pytest.raises(ValueError, match="Found loss='ppo', expected one of dpo, ipo, kto, orpo, simpo"):
        DPO(checkpoint, loss="ppo")  # type: ignore[arg-type]


def test_without_a_reference(tmp_path: Path, path: str) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="expected the callback lightning_lora.BaseAsReference"):
        trainer(tmp_path, [LoRA(r=2, summary=False)]).fit(DPO(checkpoint), PreferenceData(path, checkpoint))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "chosen": "w2"}, r"rows\.jsonl, line 1, field 'rejected': found none"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w2"}, r"line 1, field 'rejected': found the same, expected an"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceData(write(tmp_path, [row] * 2), word_checkpoint(tmp_path / "model"), val_fraction=0).setup("fit")
