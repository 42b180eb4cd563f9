"""Layouts of conversations, and what is refused of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.data.messages import is_text, read_conversation, read_question
from lightning_lora.data.record import Record

CHAT = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]
PAIR = [("user", "w1"), ("assistant", "w2")]
SHAREGPT = [{"from": "system", "value": "w0"}, {"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": CHAT}, CHAT),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"messages": json.dumps(CHAT).replace("[{", "[ {")}, CHAT),
        ({"conversations": SHAREGPT}, [("system", "w0"), *PAIR]),
        ({"conversations": CHAT}, CHAT),
        ({"messages": CHAT, "prompt": "w1 w2", "prompt_id": "7"}, CHAT),  # UltraChat
        ({"prompt": "w1", "completion": "w2"}, PAIR),
        ({"prompt": CHAT[:2], "completion": CHAT[2:3]}, CHAT[:3]),
        ({"prompt": "w1", "response": "w2"}, PAIR),
        ({"question": "w1", "answer": "w2"}, PAIR),
        ({"query": "w1", "response": "w2"}, PAIR),
        ({"input": "w1", "output": "w2"}, PAIR),
        ({"instruction": "w1", "input": "", "output": "w2"}, PAIR),
        ({"instruction": "w1", "input": None, "output": "w2"}, PAIR),
        ({"instruction": "w1", "input": "w3", "output": "w2"}, [("user", "w1\n\nw3"), ("assistant", "w2")]),
        ({"instruction": "w1", "output": "w2", "text": "all of it"}, PAIR),
        ({"instruction": "w1", "context": "w3", "response": "w2", "category": "qa"}, [("user", "w1\n\nw3"), PAIR[1]]),
        ({"id": "7", "system_prompt": "w0", "question": "w1", "response": "w2"}, [("system", "w0"), *PAIR]),
        ({"id": "7", "system_prompt": "", "question": "w1", "response": "w2"}, PAIR),
        ({"system": "w0", "messages": CHAT[1:3]}, CHAT[:3]),
        (
            {"instruction": "w1", "output": "w2", "history": [["w8", "w9"]]},
            [("user", "w8"), ("assistant", "w9"), *PAIR],
        ),
        (
            {"prompt": '{"a": 1}', "completion": '[{"name": "Bob"}]'},
            [("user", '{"a": 1}'), ("assistant", '[{"name": "Bob"}]')],
        ),
    ],
)
def test_layouts(fields: dict[str, Any], expected: list[Any]) -> None:
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in expected]
    assert read_conversation(Record("here", fields)).messages == messages
    assert read_question(Record("here", fields)).messages == messages[:-1]


def test_a_question_alone() -> None:
    assert read_question(Record("here", {"prompt": "w1"})).messages == [{"role": "user", "content": "w1"}]
    assert read_question(Record("here", {"messages": CHAT[:2]})).messages == CHAT[:2]


def test_texts() -> None:
    assert is_text(Record("here", {"text": "w1"}))
    assert not is_text(Record("here", {"text": "w1", "instruction": "w1", "output": "w2"}))


def test_what_is_not_used_is_told() -> None:
    found = read_conversation(
        Record("here", {"prompt": "w1", "completion": "w2", "id": 7, "source": "x", "note": None})
    )
    assert found.unused == {"id", "source"}


def test_contents_as_parts() -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    messages = [{"role": "user", "content": parts}, *CHAT[2:3]]
    assert read_conversation(Record("here", {"messages": messages})).messages == CHAT[1:3]


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        [{"name": "f", "arguments": {"x": 1, "y": None}}],  # as Parquet fills fields of other calls
    ],
)
def test_calls_of_tools_have_their_arguments_as_an_object(calls: list[Any]) -> None:
    messages = [
        {"role": "user", "content": "w1", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "w3", "tool_call_id": "7"},
        {"role": "assistant", "content": "w4"},
    ]
    found = read_conversation(Record("here", {"messages": messages, "tools": json.dumps([{"name": "f"}])}))
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages[0] == {"role": "user", "content": "w1"}
    assert found.tools == [{"name": "f"}]


def test_sharegpt_calls() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    turns = [SHAREGPT[1], call, {"from": "observation", "value": "w3"}, SHAREGPT[2]]
    found = read_conversation(Record("here", {"conversations": turns})).messages
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"] == [CALL]


def test_lists_as_python_writes_them_into_tables() -> None:
    row = {
        "prompt": str([{"role": "user", "content": "it's w1"}]),
        "completion": str([{"role": "assistant", "content": "w2"}]),
    }
    found = read_conversation(Record("here", row)).messages
    assert found == [{"role": "user", "content": "it's w1"}, {"role": "assistant", "content": "w2"}]


def test_what_is_missing_in_tables_says_nothing() -> None:
    row = {
        "instruction": "w1",
        "input": float("nan"),
        "context": "w2",
        "output": "w3",
        "weight": float("nan"),
        "label": True,
    }
    assert read_conversation(Record("here", row)).messages[0]["content"] == "w1\n\nw2"


@settings(deadline=None)
@given(kind=st.sampled_from(["image", "audio", "video"]), end=st.sampled_from(["", "s", "_url", "_urls", "_path"]))
def test_what_is_seen_or_heard_beside_a_text_is_an_error(kind: str, end: str) -> None:
    with pytest.raises(ValueError, match=f"field '{kind}{end}': found 'x.bin'"):
        read_conversation(Record("here", {"prompt": "w1", "completion": "w2", f"{kind}{end}": "x.bin"}))
    part = {"type": "text", "text": "w1", f"{kind}{end}": "x.bin"}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(ValueError, match=r"messages\[0\]\.content\[0\]"):
        read_conversation(Record("here", {"messages": messages}))


def test_weights() -> None:
    messages = [CHAT[1], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4] | {"weight": 1}]
    assert read_conversation(Record("here", {"messages": messages})).messages == [
        CHAT[1],
        CHAT[2] | {"weight": 0},
        *CHAT[3:],
    ]


USER, REPLY = CHAT[1], CHAT[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"other": "w1"}, r"here: found the fields 'other', expected 'messages', or 'prompt' and 'completion'"),
        ({"messages": "w1"}, r"field 'messages': found 'w1' \(str\), expected a list of messages"),
        ({"messages": '[{"role": '}, r"field 'messages': found no valid JSON"),
        ({"messages": ["w1"]}, r"field 'messages\[0\]': found 'w1', expected an object"),
        ({"messages": [CHAT[0], {"role": "bot", "content": "w"}]}, r"field 'messages\[1\]\.role': found 'bot'"),
        ({"conversations": [{"from": "me", "value": "w"}]}, r"field 'conversations\[0\]\.from': found 'me'"),
        ({"messages": [{"role": "user", "content": " "}]}, r"field 'messages\[0\]\.content': found ' ', expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"'messages\[0\]\.content\[0\]': found"),
        ({"messages": CHAT[:2]}, r"field 'messages': found none, expected at least one message with the role 'assis"),
        ({"messages": [REPLY]}, r"field 'messages': found none, expected a message before the answer"),
        ({"messages": [USER, REPLY | {"weight": 0}]}, r"found none, expected an answer whose weight is not 0"),
        ({"messages": [USER, REPLY | {"weight": 0.5}]}, r"field 'messages\[1\]\.weight': found 0\.5, expected 0 or 1"),
        ({"messages": [USER | {"weight": 0}, REPLY]}, r"field 'messages\[0\]\.weight'"),
        ({"messages": [USER, REPLY | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, r"messages\[1\]\.tool_calls"),
        ({"messages": [USER | {"tool_calls": [CALL]}, REPLY]}, r"field 'messages\[0\]\.tool_calls': found it"),
        ({"messages": CHAT, "system": "w0"}, r"field 'system': found .* beside a message with the role 'system'"),
        ({"messages": CHAT, "prompt": "w9"}, r"field 'prompt': found 'w9' .* beside 'messages'"),
        ({"messages": CHAT, "tools": "{"}, r"field 'tools': found no valid JSON"),
        ({"messages": CHAT, "history": [["w1", "w2"]]}, r"field 'history'"),
        ({"prompt": "w1"}, r"field 'completion': found none \(the fields are 'prompt'\)"),
        ({"prompt": "w1", "completion": "w2", "answer": "w3"}, r"field 'answer': found 'w3' \(str\), expected no"),
        ({"text": "w1", "answer": "w2"}, r"found the fields 'text', 'answer', expected 'messages'"),
        ({"prompt": "w1", "question": "w2", "answer": "w3"}, r"field 'question': found 'w2' \(str\), expected no such"),
        ({"messages": CHAT, "conversations": SHAREGPT}, r"field 'conversations': found .* expected no such field"),
        ({"question": "w1", "options": ["w2", "w3"], "answer": "w2"}, r"field 'options': found"),
        (
            {"prompt": "w1", "completion": "w2", "label": False},
            r"field 'label': found False \(bool\), expected no such",
        ),
        ({"prompt": "w1", "completion": "\u200b"}, r"field 'completion': found .* expected a string that is not blank"),
        (
            {"prompt": "w1", "completion": "[{'role': 'user'}\n {'role': 'user'}]"},
            r"field 'completion': found no valid JSON",
        ),
        (
            {"messages": [USER, REPLY | {"content": [{"text": "w1", "weight": 0}]}]},
            r"'messages\[1\]\.content\[0\]': found",
        ),
        ({"instruction": "w1", "input": 3, "output": "w2"}, r"field 'input': found 3 \(int\), expected a string"),
        ({"instruction": "w1", "output": ""}, r"field 'output': found '' \(str\), expected a string that is not blank"),
        (
            {"instruction": "w1", "output": "w2", "history": ["w1"]},
            r"field 'history': found \['w1'\] \(list\), expected",
        ),
        (
            {"prompt": "w1", "completion": "w2", "weight": 0.5},
            r"field 'weight': found 0\.5 \(float\), expected no such",
        ),
        ({"prompt": "w1", "completion": "w2", "reasoning": "w"}, r"field 'reasoning': found 'w' \(str\), expected no"),
    ],
)
def test_bad_rows(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conversation(Record("here", fields))
