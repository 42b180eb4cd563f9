"""From a row to a conversation: the layouts that are read."""

import ast
import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from lightning_lora.data.keys import MEANINGFUL, is_empty, unused_keys
from lightning_lora.data.record import Record, is_blank, short

# Any: beside its role and its content, a message holds what its chat template reads, such as calls of tools.
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of the layouts, by what they hold.
MESSAGES = ("messages", "conversations", "conversation")
QUESTION = ("prompt", "instruction", "question", "query", "input")
CONTEXT = ("input", "context")
ANSWER = ("completion", "output", "response", "answer")
SYSTEM = ("system", "system_prompt")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_SHAREGPT |= {"model": "assistant", "bot": "assistant", "observation": "tool", "function_response": "tool"}
_CALL = "function_call"
# Beside what was read of a row, another of these would be a second question, answer or conversation; a label that is
# false is KTO's mark of an answer that is not wanted.
OTHERS = frozenset((*MESSAGES, *QUESTION, *ANSWER))
_LIST_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")


class Conversation(NamedTuple):
    """The messages of a row.

    Args:
        messages: Each with a role of :data:`ROLES`, a content, and what else the row says of it. A ``weight`` of 0
            keeps an answer from being learned.
        fields: Where in the row each message is, for messages of errors.
        tools: Descriptions of the tools that the assistant may call, or ``None``.
        unused: Fields of the row that are left out.
    """

    messages: list[Message]
    fields: list[str]
    tools: list[dict[str, Any]] | None = None
    unused: Collection[str] = ()

    def where(self, index: int, key: str) -> str:
        """The place in the row of a key of a message."""
        return f"{self.fields[index]}.{key}" if "[" in self.fields[index] else self.fields[index]


def is_text(record: Record) -> bool:
    """Whether a row holds nothing but a text, which is learned as it is."""
    return "text" in record.fields and not any(field in record.fields for field in OTHERS)


def read_conversation(record: Record) -> Conversation:
    """The messages of a row, whose fields say in which layout it is.

    ``messages`` (or ``conversations``) is a list of ``{"role": ..., "content": ...}``, or of ShareGPT's
    ``{"from": ..., "value": ...}``; in CSV, the same as JSON. Else there is a question (``prompt``, ``instruction``,
    ``question``, ``query`` or ``input``), strings or lists of messages, and an answer (``completion``, ``output``,
    ``response`` or ``answer``). Beside both layouts go ``system`` (or ``system_prompt``) and ``tools``; beside the
    second, ``input`` or ``context`` (which follows the question after a blank line) and ``history`` (a list of pairs of
    a question and its answer).

    Raises:
        ValueError: If the row is in none of the layouts, a value is bad, or no answer follows a question.
    """
    found = _read(record, answered=True)
    answers = [index for index, message in enumerate(found.messages) if message["role"] == "assistant"]
    field = found.fields[-1].partition("[")[0]
    if not answers:
        raise record.error(field, "at least one message with the role 'assistant'", "none")
    if answers == [0]:
        raise record.error(field, "a message before the answer", "none")
    if all(found.messages[index].get("weight") == 0 for index in answers):
        raise record.error(field, "an answer whose weight is not 0", "none")
    return found


def read_question(record: Record) -> Conversation:
    """The messages of a row before its last answer, which need not be there.

    Raises:
        ValueError: If the row is in no known layout, a value is bad, or there is no question.
    """
    found = _read(record, answered=False)
    if found.messages[-1]["role"] == "assistant":
        found = found._replace(messages=found.messages[:-1], fields=found.fields[:-1])
    if not found.messages:
        raise record.error("messages", "a message before the answer", "none")
    return found


def _read(record: Record, answered: bool) -> Conversation:
    field = next((field for field in MESSAGES if not is_empty(record.fields.get(field))), None)
    used: set[str] = {*SYSTEM, "tools"}
    if field is not None:
        messages, fields = messages_in(record, field, "user")
        said = [message["content"].strip() for message in messages]
        for other in (*QUESTION, *ANSWER, *CONTEXT):
            # UltraChat's prompt is the first of its messages.
            if not is_empty(value := record.fields.get(other)) and not (
                isinstance(value, str) and value.strip() in said
            ):
                raise record.error(other, f"no such field beside {field!r}, or what one of the messages says")
            used.add(other)
        used.add(field)
    else:
        messages, fields, parts = _pair(record, answered)
        used |= parts
    system = _first(record, SYSTEM)
    if system is not None:
        if messages[0]["role"] in ("system", "developer"):
            raise record.error(system, "no such field beside a message with the role 'system'")
        messages, fields = [{"role": "system", "content": record.text(system)}, *messages], [system, *fields]
    return Conversation(messages, fields, tools_in(record), left_out(record, used))


def left_out(record: Record, used: Collection[str]) -> set[str]:
    """The fields of a row of conversations that are left out; see :func:`~lightning_lora.data.keys.unused_keys`."""
    marked = isinstance(record.fields.get("label"), bool)
    return unused_keys(record, used, OTHERS | {"label"} if marked else OTHERS)


def _pair(record: Record, answered: bool) -> tuple[list[Message], list[str], set[str]]:
    messages, fields, used = question_in(record)
    answer = _first(record, ANSWER)
    if answer is not None and (answered or not is_empty(record.fields[answer])):
        reply, reply_fields = messages_in(record, answer, "assistant")
        return messages + reply, fields + reply_fields, {*used, answer}
    if answered:
        raise record.error("output" if "instruction" in used else "completion", "a string that is not blank")
    return messages, fields, used


def question_in(record: Record) -> tuple[list[Message], list[str], set[str]]:
    """The question of a row in a field of its own, with context and history: messages, their places, fields used.

    Raises:
        ValueError: If there is none, or a value is bad.
    """
    question = _first(record, QUESTION)
    if question is None:
        filled = [field for field, value in record.fields.items() if not is_empty(value)]
        raise ValueError(
            f"{record.where}: found the fields {', '.join(map(repr, filled)) or 'none that says anything'}, expected "
            "'messages', or 'prompt' and 'completion', or another layout of the documentation. Rename the fields, or "
            "name them in the setting 'fields'."
        )
    used = {question, "history"}
    messages, fields = messages_in(record, question, "user")
    contexts = (field for field in CONTEXT if field != question and not is_empty(record.fields.get(field)))
    context = next(contexts, None)
    if context is not None:
        used.add(context)
        text = record.fields[context]
        if not isinstance(text, str):
            raise record.error(context, "a string")
        if not is_blank(text):
            if len(messages) != 1:
                raise record.error(context, "no such field beside a list of messages")
            messages = [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}]
    past, past_fields = _history(record)
    return past + messages, past_fields + fields, used


def _first(record: Record, names: tuple[str, ...]) -> str | None:
    filled = next((name for name in names if not is_empty(record.fields.get(name))), None)
    if filled is None:
        # One that is there and empty is named in the error.
        return next((name for name in names if record.fields.get(name) is not None), None) if names != SYSTEM else None
    return filled


def _history(record: Record) -> tuple[list[Message], list[str]]:
    history = record.fields.get("history")
    if is_empty(history):
        return [], []
    pairs = isinstance(history, list) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(isinstance(part, str) and part.strip() for part in pair)
        for pair in history
    )
    if not pairs:
        raise record.error("history", "a list of pairs of a question and its answer")
    return [
        {"role": role, "content": text}
        for pair in record.fields["history"]
        for role, text in zip(("user", "assistant"), pair)
    ], [f"history[{index}]" for index in range(len(record.fields["history"])) for _ in range(2)]


def tools_in(record: Record) -> list[dict[str, Any]] | None:
    tools = record.fields.get("tools")
    if is_empty(tools):
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise record.error("tools", "a list of tools as JSON", f"no valid JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise record.error("tools", "a list of objects that describe a tool each")
    return [_filled(tool) for tool in tools]


def _filled(value: Any) -> Any:
    """Without what is null, as Parquet writes fields that only other rows have."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def messages_in(record: Record, field: str, role: str) -> tuple[list[Message], list[str]]:
    """The messages in a field, and the place of each.

    The field holds a list of them, the same as JSON text, or a plain string, which is one of ``role``.

    Raises:
        ValueError: If the field holds something else.
    """
    value = record.fields.get(field)
    if isinstance(value, str):
        value = _messages_as_text(record, field, value)
    if not isinstance(value, list) and field not in MESSAGES:
        return [{"role": role, "content": record.text(field)}], [field]
    if not isinstance(value, list) or not value:
        raise record.error(field, 'a list of messages such as {"role": "user", "content": "..."}')
    fields = [f"{field}[{index}]" for index in range(len(value))]
    return [_message(record, place, message) for place, message in zip(fields, value)], fields


def _messages_as_text(record: Record, field: str, text: str) -> Any:
    """The messages that a text holds, as JSON or as Python writes a list into a table; other texts as they are."""
    if not _LIST_OF_MESSAGES.match(text) and not (field in MESSAGES and text.lstrip().startswith("[")):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise record.error(field, "a list of messages as JSON", f"no valid JSON ({error}): {short(text)}") from None
    # Other JSON is a text, such as the answer to a question for JSON.
    messages = isinstance(value, list) and value and all(isinstance(item, dict) and _role(item) for item in value)
    return value if messages else text


def _role(message: dict[str, Any]) -> str | None:
    if "role" in message:
        role = message["role"]
        return role if role in ROLES else None
    role = message.get("from")
    return _SHAREGPT.get(str(role), role if role in (*ROLES, _CALL) else None)


def _message(record: Record, place: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise record.error(place, "an object with 'role' and 'content'", repr(message))
    message = {key: value for key, value in message.items() if key == "content" or not is_empty(value)}
    role_key, content_key = ("role", "content") if "role" in message or "from" not in message else ("from", "value")
    role = _role(message)
    if role is None:
        names = ROLES if role_key == "role" else (*ROLES, *_SHAREGPT, _CALL)
        raise record.error(f"{place}.{role_key}", f"one of {', '.join(map(repr, names))}", repr(message.get(role_key)))
    read = {key: value for key, value in message.items() if key not in (role_key, content_key)}
    content = _content(record, f"{place}.{content_key}", message.get(content_key))
    if role == _CALL:
        role, content, read = "assistant", "", {**read, "tool_calls": [{"function": content}]}
    if "tool_calls" in read:
        if role != "assistant":
            raise record.error(f"{place}.tool_calls", "no such key but in messages of the assistant", "it")
        read["tool_calls"] = _calls(record, place, read["tool_calls"])
    elif is_blank(content):
        raise record.error(f"{place}.{content_key}", "a string that is not blank", repr(message.get(content_key)))
    weight = read.pop("weight", 1)
    if weight not in (0, 1) or (role != "assistant" and weight != 1):
        expected = "0 or 1" if role == "assistant" else "no such key but in messages of the assistant"
        raise record.error(f"{place}.weight", expected, repr(weight))
    return {"role": role, "content": content, **read, **({} if weight else {"weight": 0})}


def _content(record: Record, place: str, content: Any) -> str:
    if isinstance(content, list):
        for index, part in enumerate(content):
            text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            others = part.items() if isinstance(part, dict) else ()
            if not isinstance(text, str) or any(key in MEANINGFUL and not is_empty(value) for key, value in others):
                raise record.error(f"{place}[{index}]", 'a part such as {"type": "text", "text": "..."}', repr(part))
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise record.error(place, "a string that is not blank", repr(content))
    return content


def _calls(record: Record, place: str, calls: Any) -> list[dict[str, Any]]:
    """Calls of tools in the form that chat templates of transformers expect: with arguments as an object."""
    found = []
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        where = f"{place}.tool_calls[{index}]"
        call = _filled(call)
        function = call.get("function", call) if isinstance(call, dict) else call
        try:
            function = json.loads(function) if isinstance(function, str) else dict(function)
            arguments = function.get("arguments", {})
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (TypeError, ValueError) as error:
            raise record.error(where, "a function with its arguments as JSON", f"{call!r} ({error})") from None
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise record.error(where, "a function's name and an object of arguments", repr(call))
        own = {key: call[key] for key in ("id", "type") if key in call}
        found.append({"type": "function", **own, "function": {**function, "arguments": arguments}})
    return found
