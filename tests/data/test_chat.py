from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import word_checkpoint, word_model, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_lora.data import ChatData
from lightning_lora.data.conversation import IGNORED, RewrittenTurnsError, encode_conversation, encode_turns
from lightning_lora.data.packing import Packs, collate_packs, pack
from lightning_lora.data.record import Record
from lightning_lora.tasks.packed import require_separation

CHAT = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def learned(tokenizer: Any, row: dict[str, list[int]]) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_every_turn_of_the_assistant_is_learned_and_nothing_else() -> None:
    tokenizer = word_tokenizer()
    row, truncated = encode_conversation(tokenizer, [*CHAT, {"role": "user", "content": "w7"}], 100)
    assert tokenizer.decode(row["input_ids"]) == (
        "<s> system w0 </s> <s> user w1 w2 </s> <s> assistant w3 </s> <s> user w4 </s> <s> assistant w5 w6 </s>"
    )
    assert learned(tokenizer, row) == "w3 </s> w5 w6 </s>"
    assert not truncated


def test_without_a_template_contents_are_joined() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    row, _ = encode_conversation(tokenizer, CHAT, 100)
    assert tokenizer.decode(row["input_ids"]) == "w0 w1 w2 w3</s> w4 w5 w6</s>".replace("</s>", " </s>")
    assert learned(tokenizer, row) == "w3 </s> w5 w6 </s>"


@pytest.mark.parametrize(
    ("max_length", "text", "answer"),
    [
        (16, "<s> system w0 </s> <s> user w4 </s> <s> assistant w5 w6 </s>", "w5 w6 </s>"),
        (11, "<s> system w0 </s> <s> user w4 </s> <s> assistant w5", "w5"),
        (10, None, None),
    ],
)
def test_truncation_keeps_the_question_with_its_answer(max_length: int, text: str | None, answer: str | None) -> None:
    tokenizer = word_tokenizer()
    row, truncated = encode_conversation(tokenizer, CHAT, max_length)
    assert truncated
    assert (row and tokenizer.decode(row["input_ids"])) == text
    assert (row and learned(tokenizer, row)) == answer


CALLED = [
    {"role": "user", "content": "w11"},
    {"role": "assistant", "content": "w12"},
    {"role": "tool", "content": "w13 w13"},
    {"role": "assistant", "content": "w14 w14"},
]


@pytest.mark.parametrize("max_length", range(2, 50))
@pytest.mark.parametrize("template", [True, False])
def test_no_result_is_left_without_its_call_nor_an_answer_without_its_question(max_length: int, template: bool) -> None:
    tokenizer = word_tokenizer()
    if not template:
        tokenizer.chat_template = None
    row, truncated = encode_conversation(tokenizer, [*CHAT, *CALLED], max_length)
    whole, _ = encode_conversation(tokenizer, [*CHAT, *CALLED], 100)
    assert whole is not None and truncated == (max_length < len(whole["input_ids"]))
    if row is None:
        return
    assert len(row["input_ids"]) <= max_length and row["labels"][-1] != IGNORED
    text = tokenizer.decode(row["input_ids"]).split()
    for later, earlier in {"w3": "w2", "w6": "w4", "w12": "w11", "w13": "w12", "w14": "w13"}.items():
        assert later not in text or earlier in text[: text.index(later)]
    assert text[:3] == ["<s>", "system", "w0"] if template else text[0] == "w0"


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer() -> None:
    tokenizer = word_tokenizer()
    # As those do that show the thinking of the last answer only.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}w9 {% endif %}{{ m['content'] }}"
    )
    assert learned(tokenizer, encode_conversation(tokenizer, CHAT[:3], 100)[0]) == "w9 w3 </s>"
    with pytest.raises(RewrittenTurnsError, match="writes a turn of the assistant differently"):
        encode_conversation(tokenizer, CHAT, 100)
    (first, _), (second, _) = encode_turns(tokenizer, CHAT, 100)
    assert learned(tokenizer, first) == "w9 w3 </s>"
    assert tokenizer.decode(second["input_ids"]) == (
        "<s> system w0 </s> <s> user w1 w2 </s> <s> assistant w3 </s> <s> user w4 </s> <s> assistant w9 w5 w6 </s>"
    )
    assert learned(tokenizer, second) == "w9 w5 w6 </s>"


def test_the_last_answer_alone(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    ((row, _),) = encode_turns(tokenizer, CHAT, 100, train_on="last")
    assert tokenizer.decode(row["input_ids"]).startswith("<s> system w0 </s> <s> user w1 w2 </s> <s> assistant w3")
    assert learned(tokenizer, row) == "w5 w6 </s>"


def test_a_template_that_refuses_a_role_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": CHAT}] * 2)
    data = ChatData(path, word_checkpoint(tmp_path / "model"), val_fraction=0)
    data.prepare()
    data.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: .* refuses the roles system, user.*no system"):
        data.encode(Record(f"{path}, line 1", {"messages": CHAT}))


def encoded(count: int) -> list[dict[str, list[int]]]:
    tokenizer = word_tokenizer()
    order = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        words = [
            f"w{i}" for i in torch.randint(40, (int(torch.randint(2, 9, (1,), generator=order)),), generator=order)
        ]
        messages = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": " ".join(words[1:])}]
        rows.append(encode_conversation(tokenizer, messages, 32)[0])
    return rows


def packed(rows: list[Any]) -> Packs:
    return pack(rows, 32)


def test_packs_hold_every_row_once_within_the_length() -> None:
    rows = encoded(50)
    packs = packed(rows)
    found = []
    for one in packs:
        assert len(one["input_ids"]) == len(one["labels"]) == len(one["position_ids"]) <= 32
        starts = [i for i, position in enumerate(one["position_ids"]) if position == 0] + [len(one["input_ids"])]
        for start, end in pairwise(starts):
            found.append((one["input_ids"][start:end], one["labels"][start:end]))
            assert one["position_ids"][start:end] == list(range(end - start))
    key = sorted((row["input_ids"], row["labels"]) for row in rows)
    assert sorted(found) == key
    assert len(packs) < 25


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_of_a_packed_row_are_those_of_the_row_alone(attention: str) -> None:
    model = word_model(attn_implementation=attention).eval()
    packs = packed(encoded(12))
    batch = collate_packs(packs, pad_token_id=1)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    compared = 0
    for index, one in enumerate(packs):
        starts = [i for i, position in enumerate(one["position_ids"]) if position == 0] + [len(one["input_ids"])]
        for start, end in pairwise(starts):
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([one["input_ids"][start:end]]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[index, start:end], alone, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == 12 and len(packs) > 1


def test_loss_of_packs_is_that_of_the_rows(tmp_path: Path) -> None:
    import lightning as L

    from lightning_lora.tasks import CausalLM

    path = write(tmp_path, [{"prompt": f"w{i}", "completion": " ".join(["w1"] * (i % 5 + 1))} for i in range(40)])
    checkpoint = word_checkpoint(tmp_path / "model")
    losses = []
    for packing in (True, False):
        data = ChatData(path, checkpoint, val_fraction=0.5, max_length=32, packing=packing, batch_size=3)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        (result,) = trainer.validate(CausalLM(checkpoint), data, verbose=False)
        losses.append(result["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_model_that_lets_rows_see_each_other_is_an_error() -> None:
    require_separation(word_model())

    class Seeing(GPT2LMHeadModel):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
            return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), **options)

    with pytest.raises(ValueError, match="Seeing lets packed rows see each other"):
        require_separation(Seeing(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)))


@settings(deadline=None, max_examples=10)
@given(experts=st.integers(2, 6), chosen=st.integers(1, 2), seed=st.integers(0, 100))
def test_experts_that_take_the_tokens_of_all_rows_together_keep_them_apart(
    experts: int, chosen: int, seed: int
) -> None:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=experts, num_experts_per_tok=chosen)
    require_separation(MixtralForCausalLM(config))


def test_a_convolution_over_all_rows_is_an_error() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="Lfm2ForCausalLM lets packed rows see each other"):
        require_separation(Lfm2ForCausalLM(config))


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_counts_are_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "w1", "completion": " ".join(["w2"] * (30 if i < 4 else 1))} for i in range(20)]
    path, checkpoint = write(tmp_path, rows), word_checkpoint(tmp_path / "model")
    with caplog.at_level("INFO"):
        for overlong in ("truncate", "reject"):
            ChatData(path, checkpoint, val_fraction=0, max_length=20, overlong=overlong).setup("fit")  # type: ignore
    assert "training: kept 20 rows, 4 of them truncated, and rejected 0." in caplog.text
    assert "training: kept 16 rows, 0 of them truncated, and rejected 4." in caplog.text
    with pytest.raises(ValueError, match="no row for training is left"):
        ChatData(write(tmp_path, rows[:4]), checkpoint, val_fraction=0, max_length=20, overlong="reject").setup("fit")


def test_csv_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i}", "input": "", "output": "w1"} for i in range(10)]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    checkpoint = word_checkpoint(tmp_path / "model")
    one, other = (ChatData(path, checkpoint) for path in (write(tmp_path, rows), str(tmp_path / "rows.csv")))
    one.setup("fit")
    other.setup("fit")
    assert list(one.train_rows) == list(other.train_rows)
    assert list(one.val_rows) == list(other.val_rows)


def test_questions_are_padded_on_the_left(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    data = ChatData("absent.jsonl", checkpoint, predict_path=write(tmp_path, [{"prompt": "w1"}, {"prompt": "w1 w2"}]))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    decoded = [data.tokenizer.decode(row) for row in batch["input_ids"]]
    assert decoded == ["</s> <s> user w1 </s> <s> assistant", "<s> user w1 w2 </s> <s> assistant"]
    assert batch["attention_mask"].tolist() == [[0] + [1] * 6, [1] * 7]
    assert batch["question"][0] == [{"role": "user", "content": "w1"}]
