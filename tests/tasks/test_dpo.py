from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.texts import word_checkpoint

from lightning_lora import BaseAsReference, LoRA
from lightning_lora.data import PreferenceData
from lightning_lora.tasks import DPO


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
