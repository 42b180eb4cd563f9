"""What is learned of conversations by the templates that models have, written out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.chat_templates import TEMPLATES, byte_tokenizer, marked
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.data.chat_template import MessageError
from lightning_lora.data.conversation import encode_turns

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
MORE, LAST = {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Rome"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [USER, REPLY],
    "multi": [USER, REPLY, MORE, LAST],
    "system": [{"role": "system", "content": "Be."}, USER, REPLY],
    "first": [REPLY, USER, LAST],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "blue", "tool_call_id": "1"},
        LAST,
    ],
    "reasoning": [USER, REPLY | {"reasoning_content": "WHY"}, MORE, LAST | {"reasoning_content": "SO"}],
    "thoughts": [USER, REPLY | {"content": "<think>\nWHY\n</think>\n\nyo"}],
}
ML = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
TOOLS_JSON = '[{"type": "function", "function": {"name": "sky", "parameters": {}}}]'
CALLED = '<tool_call>sky {"at": "Rome"}</tool_call>'
ASKED = f"<|im_start|>system\n{TOOLS_JSON}<|im_end|>\n{ML}"
RESULT = "<|im_end|>\n<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\n"
REFUSED: list[str] = []
R1, HEAD = "<bos><|User|>hi<|Assistant|>", "<|eot_id|><|start_header_id|>"
GPT = "<|start|>user<|message|>hi<|end|><|start|>assistant"

# The rows of each conversation; none where the template has no place for what is said.
# Newer versions of transformers give a template that reads "thinking" what a message has as "reasoning_content".
THOUGHTS_ARE_NAMED_BY_TRANSFORMERS = "WHY" in byte_tokenizer(
    "{% for m in messages %}{{ m.thinking }}{% endfor %}"
).apply_chat_template([{"role": "assistant", "content": "yo", "reasoning_content": "WHY"}], tokenize=False)
EXPECTED: dict[tuple[str, str], list[str]] = {
    ("chatml", "single"): [f"{ML}«yo<|im_end|>»"],
    ("chatml", "multi"): [f"{ML}«yo<|im_end|>»{NEXT.removeprefix('<|im_end|>')}«no<|im_end|>»"],
    ("chatml", "system"): [f"<|im_start|>system\nBe.<|im_end|>\n{ML}«yo<|im_end|>»"],
    ("chatml", "first"): [f"<|im_start|>assistant\nyo<|im_end|>\n{ML}«no<|im_end|>»"],
    ("chatml", "tools"): REFUSED,
    ("chatml", "reasoning"): REFUSED,
    ("chatml", "thoughts"): [f"{ML}«<think>\nWHY\n</think>\n\nyo<|im_end|>»"],
    ("tools", "tools"): [f"{ASKED}«{CALLED}<|im_end|>»{RESULT.removeprefix('<|im_end|>')}«no<|im_end|>»"],
    ("tools", "reasoning"): REFUSED,
    ("qwen3", "single"): [f"{ML}«<think>\n\n</think>\n\nyo<|im_end|>»"],
    ("qwen3", "multi"): [
        f"{ML}«<think>\n\n</think>\n\nyo<|im_end|>»",
        f"{ML}yo{NEXT}«<think>\n\n</think>\n\nno<|im_end|>»",
    ],
    ("qwen3", "tools"): [
        f"{ASKED}«<think>\n\n</think>\n\n{CALLED}<|im_end|>»",
        f"{ASKED}{CALLED}{RESULT}«<think>\n\n</think>\n\nno<|im_end|>»",
    ],
    ("qwen3", "reasoning"): [
        f"{ML}«<think>\nWHY\n</think>\n\nyo<|im_end|>»",
        f"{ML}yo{NEXT}«<think>\nSO\n</think>\n\nno<|im_end|>»",
    ],
    ("qwen3", "thoughts"): [f"{ML}«<think>\nWHY\n</think>\n\nyo<|im_end|>»"],
    ("deepseek", "single"): [f"{R1}<think>\n«yo<eos>»"],
    ("deepseek", "multi"): [
        f"{R1}<think>\n«yo<eos>»",
        f"{R1}yo<eos><|User|>more<|Assistant|><think>\n«no<eos>»",
    ],
    ("deepseek", "system"): ["<bos>Be.<|User|>hi<|Assistant|><think>\n«yo<eos>»"],
    ("deepseek", "first"): ["<bos><|Assistant|>yo<eos><|User|>hi<|Assistant|><think>\n«no<eos>»"],
    ("deepseek", "thoughts"): [f"{R1}<think>\n«WHY\n</think>\n\nyo<eos>»"],
    ("deepseek", "tools"): REFUSED,
    ("deepseek", "reasoning"): REFUSED,
    ("closing", "single"): [f"{ML}<think>\n«\n</think>\n\nyo<|im_end|>»"],
    ("closing", "reasoning"): [
        f"{ML}<think>\n«WHY\n</think>\n\nyo<|im_end|>»",
        f"{ML}yo{NEXT}<think>\n«SO\n</think>\n\nno<|im_end|>»",
    ],
    ("closing", "thoughts"): [f"{ML}<think>\n«WHY\n</think>\n\nyo<|im_end|>»"],
    ("closing", "tools"): REFUSED,
    ("phi", "single"): ["<|user|>\nhi<|end|>\n<|assistant|>\n«yo<|end|>»"],
    ("phi", "multi"): [
        "<|user|>\nhi<|end|>\n<|assistant|>\n«yo<|end|>»\n<|user|>\nmore<|end|>\n<|assistant|>\n«no<|end|>»"
    ],
    ("phi", "tools"): REFUSED,
    ("phi", "reasoning"): REFUSED,
    ("llama3", "multi"): [
        f"<bos><|start_header_id|>user<|end_header_id|>\n\nhi{HEAD}assistant<|end_header_id|>\n\n«yo<|eot_id|>»"
        f"<|start_header_id|>user<|end_header_id|>\n\nmore{HEAD}assistant<|end_header_id|>\n\n«no<|eot_id|>»"
    ],
    ("llama3", "tools"): REFUSED,
    ("llama3", "reasoning"): REFUSED,
    ("mistral", "multi"): ["<bos>[INST] hi [/INST]« yo<eos>»[INST] more [/INST]« no<eos>»"],
    ("mistral", "system"): REFUSED,
    ("mistral", "first"): REFUSED,
    ("mistral", "tools"): REFUSED,
    ("mistral", "reasoning"): REFUSED,
    ("gemma", "single"): ["<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«yo<end_of_turn>»"],
    ("gemma", "system"): REFUSED,
    ("gemma", "first"): REFUSED,
    ("gemma", "tools"): REFUSED,
    ("gemma", "reasoning"): REFUSED,
    ("parts", "multi"): [
        "User: hi<end_of_utterance>\nAssistant:« yo<end_of_utterance>»\nUser: more<end_of_utterance>\n"
        "Assistant:« no<end_of_utterance>»"
    ],
    ("parts", "tools"): REFUSED,
    ("parts", "reasoning"): REFUSED,
    ("channels", "multi"): [
        f"{GPT}«<|channel|>final<|message|>yo<|return|>»",
        f"{GPT}<|channel|>final<|message|>yo<|end|><|start|>user<|message|>more<|end|><|start|>assistant"
        "«<|channel|>final<|message|>no<|return|>»",
    ],
    ("channels", "system"): [f"<|start|>developer<|message|>Be.<|end|>{GPT}«<|channel|>final<|message|>yo<|return|>»"],
    ("channels", "tools"): REFUSED,
    ("channels", "reasoning"): REFUSED
    if not THOUGHTS_ARE_NAMED_BY_TRANSFORMERS
    else [
        f"{GPT}«<|channel|>analysis<|message|>WHY<|end|><|start|>assistant<|channel|>final<|message|>yo<|return|>»",
        f"{GPT}<|channel|>final<|message|>yo<|end|><|start|>user<|message|>more<|end|><|start|>assistant"
        "«<|channel|>analysis<|message|>SO<|end|><|start|>assistant<|channel|>final<|message|>no<|return|>»",
    ],
    ("endless", "multi"): ["<|user|>\nhi\n<|assistant|>\n«yo»\n<|user|>\nmore\n<|assistant|>\n«no»"],
    ("endless", "tools"): REFUSED,
    ("endless", "reasoning"): REFUSED,
    ("marked", "multi"): [f"{ML}«yo<|im_end|>»{NEXT.removeprefix('<|im_end|>')}«no<|im_end|>»"],
    ("marked", "first"): [f"<|im_start|>assistant\nyo<|im_end|>\n{ML}«no<|im_end|>»"],
    ("marked", "tools"): REFUSED,
    ("marked", "reasoning"): [
        f"{ML}«<think>WHY</think>yo<|im_end|>»{NEXT.removeprefix('<|im_end|>')}«<think>SO</think>no<|im_end|>»"
    ],
}


def rows(name: str, kind: str, **options: Any) -> list[str]:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    tools = [TOOL] if kind == "tools" else None
    return [
        marked(tokenizer, row) for row, _ in encode_turns(tokenizer, CONVERSATIONS[kind], 900, tools, **options) if row
    ]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned(name: str, kind: str) -> None:
    expected = EXPECTED.get((name, kind))
    if expected == REFUSED:
        with pytest.raises(ValueError, match="template (refuses|leaves out)|leaves out"):
            rows(name, kind)
        return
    found = rows(name, kind)
    if expected is not None:
        assert found == expected
    answers = [message for message in CONVERSATIONS[kind] if message["role"] == "assistant"]
    learned = "".join(part.split("»")[0] for row in found for part in row.split("«")[1:])
    said = [
        text
        for message in answers[kind == "first" :]
        for text in (message["content"], message.get("reasoning_content"))
    ]
    assert all(text.rpartition("</think>")[2].strip() in learned for text in said if text)
    assert "hi" not in learned.replace("<think>", "").replace("</think>", "") and "more" not in learned


@pytest.mark.parametrize("name", TEMPLATES)
def test_questions_are_those_that_the_model_is_asked(name: str) -> None:
    """Each answer follows the very tokens of the question that ``predict`` asks."""
    from lightning_lora.data.conversation import encode_question

    tokenizer = byte_tokenizer(TEMPLATES[name])
    found = encode_turns(tokenizer, CONVERSATIONS["multi"], 900)
    ends = [
        row["input_ids"][:start]
        for row, _ in found
        if row
        for start, (before, label) in enumerate(zip([-100, *row["labels"]], row["labels"]))
        if before == -100 != label
    ]
    assert ends == [encode_question(tokenizer, CONVERSATIONS["multi"][:count]) for count in (1, 3)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_answer_alone(name: str) -> None:
    (found,) = rows(name, "multi", train_on="last")
    assert found.count("«") == 1 and "no" in found.split("«")[1]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "marked"])
def test_an_answer_of_weight_0_is_not_learned(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    messages = [USER, REPLY | {"weight": 0}, MORE, LAST]
    (found,) = [marked(tokenizer, row) for row, _ in encode_turns(tokenizer, messages, 900) if row]
    before, learned = found.split("«")
    assert "yo<|im_end|>" in before and learned.endswith("no<|im_end|>»")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", r"messages\[1\]\.content: found 'yo', which the chat template leaves out"),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            r"messages\[0\]\.content: found 'hi', which the chat templ",
        ),
    ],
)
def test_what_a_template_leaves_out_is_an_error(template: str, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        encode_turns(byte_tokenizer(template), [USER, REPLY], 100)


@settings(deadline=None)
@given(left_out=st.sampled_from(["system", "tool"]), words=st.lists(st.sampled_from(["a", "hi", "yo"]), min_size=1))
def test_words_that_stand_elsewhere_do_not_make_up_for_what_is_left_out(left_out: str, words: list[str]) -> None:
    text = " ".join(words)
    template = TEMPLATES["chatml"].replace(
        "{% for m in messages %}", f"{{% for m in messages if m.role != '{left_out}' %}}"
    )
    assert template != TEMPLATES["chatml"]
    messages = [USER | {"content": f"{text} more"}, REPLY, {"role": left_out, "content": text}, MORE, LAST]
    with pytest.raises(MessageError, match=r"messages\[2\]\.content: found .*, which the chat template leaves out"):
        encode_turns(byte_tokenizer(template), messages, 1000)
    assert encode_turns(byte_tokenizer(TEMPLATES["chatml"]), messages, 1000)[0][0] is not None


CALLING = (
    "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls or [] %}CALL{% endfor %}<eos>{% endfor %}"
)


@settings(deadline=None)
@given(places=st.lists(st.sampled_from(["Rome", "Bern"]), min_size=2, max_size=4))
def test_every_call_and_its_arguments_must_be_written(places: list[str]) -> None:
    calls = [{"type": "function", "function": {"name": "sky", "arguments": {"at": place}}} for place in places]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": calls}]
    whole = "{{ c.function | tojson }}"
    ((row, _),) = encode_turns(byte_tokenizer(CALLING.replace("CALL", whole)), messages, 1000)
    assert row is not None
    for template, number in (("{{ c.function.name }}", 0), (f"{{% if loop.first %}}{whole}{{% endif %}}", 1)):
        with pytest.raises(MessageError, match=rf"tool_calls\[{number}\]: found .* leaves out a part"):
            encode_turns(byte_tokenizer(CALLING.replace("CALL", template)), messages, 1000)
    bare = [{"type": "function", "function": {"name": "sky", "arguments": {}}}]
    without = byte_tokenizer(CALLING.replace("CALL", "{{ c.function.name }}"))
    ((row, _),) = encode_turns(without, [USER, {"role": "assistant", "content": "", "tool_calls": bare}], 1000)
    assert marked(without, row) == "userhi<eos>«assistantsky<eos>»"


@settings(deadline=None)
@given(place=st.text("aé你'\"", min_size=1, max_size=4), join=st.booleans(), said=st.booleans())
def test_arguments_are_written_as_json(place: str, join: bool, said: bool) -> None:
    arguments = {"at": place}
    call = {"type": "function", "function": {"name": "sky", "arguments": arguments}}
    content = str(arguments) if said else ""  # which a template writes as it is
    messages = [USER, {"role": "assistant", "content": content, "tool_calls": [call]}]
    write = "{{ 'sky' + c.function.arguments }}" if join else "{{ 'sky' }}{{ c.function.arguments }}"
    expected = f"sky{json.dumps(arguments, ensure_ascii=False)}<eos>»"
    for template in (write, "{{ 'sky' }}{{ c.function.arguments | tojson }}"):
        tokenizer = byte_tokenizer(CALLING.replace("CALL", "{{ c.function.name[3:] }}" + template))
        ((row, _),) = encode_turns(tokenizer, messages, 1000)
        assert row is not None
        assert (tokenizer.decode(row["input_ids"]) + "»").endswith(expected)


def test_an_unknown_key_is_an_error_unless_the_template_writes_it() -> None:
    messages = [USER | {"name": "Ann"}, REPLY]
    with pytest.raises(MessageError, match=r"messages\[0\]\.name: found 'Ann'"):
        encode_turns(byte_tokenizer(TEMPLATES["chatml"]), messages, 100)
    naming = "{% for m in messages %}{{ (m.name or m.role) + ': ' + m.content + '<eos>' }}{% endfor %}"
    tokenizer = byte_tokenizer(naming)
    ((row, _),) = encode_turns(tokenizer, messages, 100)
    assert marked(tokenizer, row) == "Ann: hi<eos>«assistant: yo<eos>»"
    with pytest.raises(MessageError, match="there is no chat template that writes it"):
        encode_turns(byte_tokenizer(None), messages, 100)


def test_the_developer_is_the_system_where_the_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "Be."}, USER, REPLY]
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    ((row, _),) = encode_turns(tokenizer, messages, 100)
    assert marked(tokenizer, row) == EXPECTED["chatml", "system"][0]


def test_arguments_go_as_a_text_into_templates_that_join_them() -> None:
    joining = (
        "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + "
    )
    joining += "c.function.arguments }}{% endfor %}{{ '<eos>' }}{% endfor %}"
    tokenizer = byte_tokenizer(joining)
    ((row, _),) = encode_turns(tokenizer, CONVERSATIONS["tools"][:2], 100)
    assert 'sky {"at": "Rome"}<eos>»' in marked(tokenizer, row)


def test_no_stop_and_open_thoughts_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="no token that ends an answer"):
        encode_turns(byte_tokenizer("once" + TEMPLATES["endless"]), [USER, REPLY], 100)
    with pytest.warns(UserWarning, match="begins an answer with <think>"):
        encode_turns(byte_tokenizer("once" + TEMPLATES["deepseek"]), [USER, REPLY], 100)


def test_an_answer_that_begins_as_the_prompt_does_is_learned_whole() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["deepseek"])
    ((row, _),) = encode_turns(tokenizer, [USER, REPLY | {"content": "<b>yo</b>"}], 100)
    assert marked(tokenizer, row) == f"{R1}<think>\n«<b>yo</b><eos>»"


def test_a_token_that_the_tokenizer_puts_behind_texts_stays_behind_the_answer() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(None)
    ids = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    ((row, _),) = encode_turns(tokenizer, [USER, REPLY], 100)
    assert marked(tokenizer, row) == "<bos>hi\n«yo<eos>»"


def test_thoughts_that_marks_leave_out_are_learned_answer_by_answer() -> None:
    template = TEMPLATES["marked"].replace("if m.reasoning_content else", "if m.reasoning_content and loop.last else")
    tokenizer = byte_tokenizer(template)
    found = [marked(tokenizer, row) for row, _ in encode_turns(tokenizer, CONVERSATIONS["reasoning"], 900) if row]
    assert found == [
        f"{ML}«<think>WHY</think>yo<|im_end|>»",
        f"{ML}yo{NEXT}«<think>SO</think>no<|im_end|>»",
    ]


def test_the_first_token_of_a_row_is_never_learned() -> None:
    """Else a packed row would teach the one before it how the next begins."""
    template = (
        "{% for m in messages | reverse %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<eos>' }}"
    )
    template += "{% endgeneration %}{% else %}{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
    tokenizer = byte_tokenizer(template)
    ((row, _),) = encode_turns(tokenizer, CONVERSATIONS["single"], 900)
    assert marked(tokenizer, row) == "y«o<eos>»"
