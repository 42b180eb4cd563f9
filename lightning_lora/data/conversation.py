"""From a row to a conversation, and from a conversation to tokens of which the assistant's alone are learned."""

import json
from typing import Any

from lightning_lora.data.files import Record

Message = dict[str, str]
Row = dict[str, list[int]]

IGNORED = -100  # the label of a token that does not count for the loss
ROLES = ("system", "user", "assistant", "tool")


def read_conversation(record: Record) -> list[Message]:
    """The messages of a row, whose fields say in which of three layouts it is.

    ``messages`` is a list of ``{"role": ..., "content": ...}`` (in CSV: as JSON). ``prompt`` and ``completion`` are
    strings, or such lists. ``instruction``, ``input`` (may be absent or blank) and ``output`` are those of Alpaca: the
    input follows the instruction after a blank line.

    Raises:
        ValueError: If the row is in none of the layouts, a value is bad, or no message is the assistant's.
    """
    if "messages" in record.fields:
        field, messages = "messages", messages_in(record, "messages", "user")
    elif "prompt" in record.fields:
        field, messages = "completion", _prompt_completion(record)
    else:
        field, messages = "output", _alpaca(record)
    if not any(message["role"] == "assistant" for message in messages):
        raise record.error(field, "at least one message with the role 'assistant'", "none")
    return messages


def read_question(record: Record) -> list[Message]:
    """The messages of a row before its last answer, which need not be there.

    Raises:
        ValueError: If the row is in no known layout, a value is bad, or there is no question.
    """
    if "messages" in record.fields:
        messages = messages_in(record, "messages", "user")
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not question:
            raise record.error("messages", "a message before the answer", "none")
        return question
    if "prompt" in record.fields:
        return messages_in(record, "prompt", "user")
    return _alpaca(Record(record.where, record.fields | {"output": "-"}))[:1]


def messages_in(record: Record, field: str, role: str) -> list[Message]:
    """The messages in a field: a list of them, the same as JSON text, or a plain string, which is one of ``role``.

    Raises:
        ValueError: If the field holds something else.
    """
    value = record.fields.get(field)
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise record.error(field, "a list of messages as JSON", f"no valid JSON ({error})") from None
    if isinstance(value, str) and field != "messages":
        return [{"role": role, "content": record.text(field)}]
    if not isinstance(value, list) or not value:
        raise record.error(field, 'a list of messages such as {"role": "user", "content": "..."}')
    return [_message(record, f"{field}[{index}]", message) for index, message in enumerate(value)]


def _message(record: Record, field: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise record.error(field, "an object with 'role' and 'content'", repr(message))
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise record.error(f"{field}.role", f"one of {', '.join(map(repr, ROLES))}", repr(role))
    if not isinstance(content, str) or not content.strip():
        raise record.error(f"{field}.content", "a string that is not blank", repr(content))
    return {"role": role, "content": content}


def _prompt_completion(record: Record) -> list[Message]:
    return messages_in(record, "prompt", "user") + messages_in(record, "completion", "assistant")


def _alpaca(record: Record) -> list[Message]:
    if "instruction" not in record.fields:
        raise ValueError(
            f"{record.where}: found the fields {', '.join(map(repr, record.fields)) or 'none at all'}, expected "
            "'messages', or 'prompt' and 'completion', or 'instruction' and 'output'. Rename the fields."
        )
    question = record.text("instruction")
    context = record.fields.get("input")
    if context is not None and not isinstance(context, str):
        raise record.error("input", "a string")
    if context and context.strip():
        question = f"{question}\n\n{context}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record.text("output")}]


def encode_question(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of the messages up to where the assistant's next answer begins.

    Raises:
        ValueError: If the chat template refuses the messages.
    """
    if tokenizer.chat_template:
        text = _apply(tokenizer, messages, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    stretches = _segments(tokenizer, [*messages, {"role": "assistant", "content": "-"}])
    return [token for ids, _ in stretches[:-1] for token in ids]


def encode_conversation(tokenizer: Any, messages: list[Message], max_length: int) -> tuple[Row, bool]:
    """Token ids and labels of a conversation, and whether it had to be truncated.

    The labels are the tokens that the assistant writes, in each of its turns, with the token that closes the turn, and
    :data:`IGNORED` elsewhere. What follows the last of them is left out, since nothing there is learned. A conversation
    that is too long loses its oldest exchanges first (a system message stays), then the beginning of what is left
    before the last answer, and of that answer itself only what would not fit alone.

    Args:
        tokenizer: One of transformers. Without a chat template, the contents are joined by line breaks, and each of the
            assistant's is closed by the end-of-text token.
        messages: At least one of them the assistant's.
        max_length: Longest row, in tokens, at least 2.

    Raises:
        ValueError: If the chat template refuses the messages, or writes a turn differently once others follow.
    """
    segments = _segments(tokenizer, messages)
    truncated = False
    while sum(len(ids) for ids, _ in segments) > max_length and (shorter := _without_oldest_exchange(messages)):
        messages, truncated = shorter, True
        segments = _segments(tokenizer, messages)
    answer = segments[-1][0]
    before = [(token, learned) for ids, learned in segments[:-1] for token in ids]
    truncated = truncated or len(before) + len(answer) > max_length
    # One token before the answer stays in any case: the first token of a row is never predicted.
    answer = answer[: max_length - 1]
    before = before[-(max_length - len(answer)) :]
    labels = [token if learned else IGNORED for token, learned in before] + answer
    labels[0] = IGNORED
    return {"input_ids": [token for token, _ in before] + answer, "labels": labels}, truncated


def _without_oldest_exchange(messages: list[Message]) -> list[Message] | None:
    """The messages without the first question and its answer, ``None`` if only one is left."""
    start = 1 if messages[0]["role"] == "system" else 0
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[:start] + messages[answers[0] + 1 :] if len(answers) > 1 else None


def _segments(tokenizer: Any, messages: list[Message]) -> list[tuple[list[int], bool]]:
    """Stretches of tokens, each learned or not; the last is the last answer.

    Stretches are tokenized one by one, as an answer will follow its question when the model is used.
    """
    texts = _templated(tokenizer, messages) if tokenizer.chat_template else _joined(tokenizer, messages)
    stretches = [
        # Without a template, a tokenizer may have to begin the text with a token of its own.
        (tokenizer(text, add_special_tokens=index == 0 and not tokenizer.chat_template)["input_ids"], learned)
        for index, (text, learned) in enumerate(texts)
    ]
    return [(list(ids), learned) for ids, learned in stretches]


def _templated(tokenizer: Any, messages: list[Message]) -> list[tuple[str, bool]]:
    texts, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _apply(tokenizer, messages[:index], add_generation_prompt=True)
        # What follows the end of a turn (a line break) is never generated.
        answered = _apply(tokenizer, messages[: index + 1], add_generation_prompt=False).rstrip()
        if not answered.startswith(asked) or not asked.startswith(done):
            raise ValueError(
                "The tokenizer's chat template writes a turn of the assistant differently once it is answered or "
                "others follow, so that what the model would generate cannot be told from the conversation. Split "
                "it into rows with one answer each, or use a checkpoint whose template does not."
            )
        texts += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return texts


def _apply(tokenizer: Any, messages: list[Message], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"The tokenizer's chat template refuses the roles {roles}: {error}.") from None


def _joined(tokenizer: Any, messages: list[Message]) -> list[tuple[str, bool]]:
    texts: list[tuple[str, bool]] = []
    waiting = ""
    for message in messages:
        if message["role"] != "assistant":
            waiting += message["content"] + "\n"
            continue
        texts += [(waiting or "\n", False), (message["content"] + (tokenizer.eos_token or ""), True)]
        waiting = "\n"
    return texts
