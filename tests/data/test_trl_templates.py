"""The chat templates of models in wide use, as TRL ships them: what is learned of each is right, or it is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_templates import byte_tokenizer, marked

from lightning_lora.data.conversation import encode_turns
from lightning_lora.data.messages import read_conversation
from lightning_lora.data.record import Record

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC is not None and SPEC.origin else Path("absent")
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TEMPLATES, reason="needs: pip install --no-deps trl==1.16.0")]

SKY = {
    "name": "sky",
    "description": "What the sky is like.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Paris"}'}}
USER, MORE = ({"role": "user", "content": text} for text in ("ASKED", "ASKED AGAIN"))
FIRST, LAST = ({"role": "assistant", "content": text} for text in ("yo", "no"))
ROWS: dict[str, dict[str, Any]] = {
    "single": {"messages": [USER, FIRST]},
    "multi": {"messages": [USER, FIRST, MORE, LAST]},
    "first": {"messages": [{"role": "assistant", "content": "UNASKED"}, USER, FIRST]},
    "system": {"messages": [{"role": "system", "content": "TOLD"}, USER, FIRST]},
    "tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "sky", "content": "FOUND"},
            FIRST,
        ],
        "tools": [{"type": "function", "function": SKY}],
    },
    "reasoning": {
        "messages": [USER, {**FIRST, "reasoning_content": "because"}, MORE, {**LAST, "reasoning_content": "therefore"}]
    },
}
LEARNED = {"tools": ["sky", "Paris", "yo"], "reasoning": ["because", "yo", "therefore", "no"], "multi": ["yo", "no"]}
# Some that write what others leave out.
WRITTEN = [
    *((name, "tools") for name in ("qwen2_5", "qwen3", "llama3_1", "gptoss", "glm4moe", "gemma4", "lfm2_2_5")),
    *((name, "reasoning") for name in ("qwen3", "gptoss", "glm4moe", "nemotron_3_nano", "qwen3_8")),
]


def encoded(name: str, kind: str) -> list[str]:
    """The rows, with what is learned in «»."""
    tokenizer, found = byte_tokenizer(TEMPLATES[name]), read_conversation(Record("here", ROWS[kind]))
    rows = encode_turns(tokenizer, found.messages, 4000, found.tools)
    return [marked(tokenizer, row) for row, _ in rows if row is not None]


def refusal(name: str, kind: str) -> str:
    try:
        encoded(name, kind)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_alone_are_learned_or_the_row_is_refused(name: str, kind: str) -> None:
    if said := refusal(name, kind):
        assert "chat template refuses the roles" in said or "which the chat template leaves out" in said
        assert kind not in ("single", "multi") and (name, kind) not in WRITTEN
        return
    rows = encoded(name, kind)
    parts = [part.partition("»") for row in rows for part in row.split("«")[1:]]
    learned = "".join(part for part, _, _ in parts)
    assert all(text in learned for text in LEARNED.get(kind, ["yo"]))
    assert not any(text in learned for text in ("ASKED", "TOLD", "FOUND"))
    assert all("ASKED" in row.split("«")[0] for row in rows)


def test_there_are_templates_of_each_kind() -> None:
    assert len(TEMPLATES) >= 30 and {name for name, _ in WRITTEN} <= set(TEMPLATES)
