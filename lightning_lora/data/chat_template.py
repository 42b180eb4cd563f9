"""What a tokenizer's chat template writes: questions as the model is asked them, and answers as it would write them."""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.data.messages import Message

Tools = list[dict[str, Any]] | None

# How tests of templates find their own words again.
_PROBE = "probe"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class MessageError(ValueError):
    """What is wrong with a message, once its place in the row is known.

    Args:
        index: Of the message.
        key: Of what is wrong in it.
        found: What it holds.
        expected: What it should hold.
    """

    def __init__(self, index: int, key: str, found: str, expected: str) -> None:
        super().__init__(f"messages[{index}].{key}: found {found}, expected {expected}.")
        self.index, self.key, self.found, self.expected = index, key, found, expected


class Exchange(NamedTuple):
    """A question and its answer.

    Args:
        asked: All that comes before the answer, up to where the model begins to write.
        answer: What the model would write, with the token that ends its turn.
        stops: Whether there is such a token.
    """

    asked: str
    answer: str
    stops: bool


def exchange(tokenizer: Any, messages: list[Message], tools: Tools = None) -> Exchange:
    """The last of the messages, which is the assistant's, as the answer to those before it.

    Raises:
        MessageError: If the template leaves out what a message says.
        ValueError: If the template refuses the messages.
    """
    *before, message = messages
    asked = render(tokenizer, before, tools, add_generation_prompt=True)
    whole = render(tokenizer, messages, tools)
    if apart := _thoughts_apart(message):
        # Some write thoughts only where they are a key of the message.
        other = render(tokenizer, [*before, apart], tools)
        if other.count(apart["reasoning_content"]) > whole.count(apart["reasoning_content"]):
            message, whole = apart, other
    shared = len(asked) if whole.startswith(asked) else _shared(asked, whole)
    begun = ""  # what the question has of the answer already, such as <think>
    if shared < len(asked):
        if shared < _shared(asked, render(tokenizer, before, tools)):
            raise ValueError(
                "The tokenizer's chat template writes a question differently once it is answered, so that what the "
                "model would be asked cannot be told from the conversation. Use a checkpoint whose template does not."
            )
        # What they share may reach into an answer that happens to begin with the same characters.
        for text in texts_of(message):
            place = whole.find(text, max(0, shared - len(text) + 1), shared - 1 + len(text))
            shared = shared if place < 0 else place
        begun = asked[shared:].strip()
    written = _with_thoughts(whole[shared:], message["content"].strip())
    if begun and written.lstrip().startswith(begun):
        written = written.lstrip().removeprefix(begun).removeprefix("\n" if asked.endswith("\n") else "")
    elif begun == "<think>" and "</think>" not in written:
        _warn_of_open_thoughts(tokenizer.chat_template)
    missing = next((text for text in texts_of(message) if text not in written), None)
    if missing is not None:
        raise MessageError(
            len(before), "content", f"{_short(missing)}, which the chat template leaves out", "one that it writes"
        )
    answer, stops = _until_stop(tokenizer, written, message)
    return Exchange(asked, answer, stops)


def render(tokenizer: Any, messages: list[Message], tools: Tools, add_generation_prompt: bool = False) -> str:
    """The messages as the chat template writes them.

    Raises:
        ValueError: If the template refuses them.
    """
    return str(_apply(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False))


def has_generation_marks(tokenizer: Any, tools: Tools = None) -> bool:
    """Whether the chat template itself marks what the assistant writes, by ``{% generation %}``."""
    return _GENERATION.search(_template(tokenizer, tools)) is not None


def generated(tokenizer: Any, messages: list[Message], tools: Tools = None) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the chat template marks as written by the assistant.

    Raises:
        ValueError: If the template refuses the messages.
    """
    found = _apply(tokenizer, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def require_written(tokenizer: Any, messages: list[Message], tools: Tools = None) -> None:
    """Require that the chat template writes all that the messages hold: contents, calls of tools, reasoning, any key.

    Raises:
        MessageError: For the first that it leaves out.
        ValueError: If it refuses the messages.
    """
    if tokenizer.chat_template is None:
        for index, message in enumerate(messages):
            for key in message.keys() - {"role", "content", "weight"}:
                raise MessageError(index, key, _short(message[key]), "none: there is no chat template that writes it")
        if tools:
            raise ValueError("found 'tools', expected none, for there is no chat template that writes them.")
        return
    whole = render(tokenizer, messages, tools)
    unmarked = _left_out(tokenizer, messages, tools, whole)
    for index, message in enumerate(messages):
        text = message["content"].strip()
        # Some write results of tools as JSON.
        is_written = text in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole
        if message["role"] != "assistant" and (index in unmarked or not is_written):
            found = f"{_short(text)}, which the chat template leaves out"
            raise MessageError(index, "content", found, "one that it writes")
        for key in sorted(message.keys() - {"role", "content", "weight"}):
            if message["role"] == "tool" and key in ("name", "tool_call_id"):
                continue  # which say what the order of the messages says too
            bare = {name: value for name, value in message.items() if name != key}
            # As the last message: what was thought in earlier turns is left out on purpose.
            start, end = messages[:index], messages[index + 1 :]
            written, without = (_written(tokenizer, [*start, each], tools) for each in (message, bare))
            if written is None:
                written, without = whole, _written(tokenizer, [*start, bare, *end], tools)
            if written == without:
                raise MessageError(
                    index, key, f"{_short(message[key])}, which the chat template leaves out", "a key that it writes"
                )
        _require_written_calls(tokenizer, messages, index, tools)
    if tools and _written(tokenizer, messages, None) == whole:
        raise ValueError("found 'tools', which the chat template leaves out, expected a template that writes them.")


def _left_out(tokenizer: Any, messages: list[Message], tools: Tools, whole: str) -> set[int]:
    """Which messages but the assistant's are left out, though their words may stand there in others."""
    others = [index for index, message in enumerate(messages) if message["role"] != "assistant"]
    marks = {index: _mark(index) for index in others}
    marked = [{**message, "content": message["content"] + marks.get(i, "")} for i, message in enumerate(messages)]
    written = _written(tokenizer, marked, tools)
    return set() if written is None else _unwritten(marks, written, whole)


def _require_written_calls(tokenizer: Any, messages: list[Message], index: int, tools: Tools) -> None:
    """Require that each call of a message is written, by name and, where there are some, with its arguments."""
    calls = messages[index].get("tool_calls", [])
    names = {number: _mark(number) for number in range(len(calls))}
    arguments = {number: _mark(len(calls) + number) for number in names if calls[number]["function"]["arguments"]}
    marked = []
    for number, call in enumerate(calls):
        function = {**call["function"], "name": call["function"]["name"] + names[number]}
        if number in arguments:
            function["arguments"] = {**function["arguments"], arguments[number]: arguments[number]}
        marked.append({**call, "function": function})
    before = messages[:index]
    written = _written(tokenizer, [*before, {**messages[index], "tool_calls": marked}], tools) if calls else None
    if written is None:
        return
    whole = _written(tokenizer, messages[: index + 1], tools) or ""
    for number in sorted(_unwritten(names, written, whole) | _unwritten(arguments, written, whole)):
        found = f"{_short(calls[number]['function'])}, of which the chat template leaves out a part"
        raise MessageError(index, f"tool_calls[{number}]", found, "a call that it writes")


def _mark(number: int) -> str:
    """A word that can be told from those of other numbers."""
    return f"{_PROBE}{number}z"


def _unwritten(marks: dict[int, str], written: str, whole: str) -> set[int]:
    return {index for index, mark in marks.items() if written.count(mark) <= whole.count(mark)}


def _written(tokenizer: Any, messages: list[Message], tools: Tools) -> str | None:
    try:
        return render(tokenizer, messages, tools)
    except ValueError:
        return None


def _apply(tokenizer: Any, messages: list[Message], tools: Tools, **options: Any) -> Any:
    given = [_given(tokenizer, message, tools) for message in messages]
    try:
        if any("tool_calls" in message for message in given):
            given = _with_arguments_as_wanted(tokenizer, given, tools, options.get("add_generation_prompt", False))
        return tokenizer.apply_chat_template(given, tools=tools, **options)
    except Exception as error:  # a template is code, which may raise anything
        raise _refusal(messages, error) from None


def _with_arguments_as_wanted(tokenizer: Any, given: list[Message], tools: Tools, asks: bool) -> list[Message]:
    """The messages with the arguments of calls as objects, as transformers has them, or as texts.

    Some templates join them to a text, which objects cannot be, and some write them as they are, which is in Python's
    notation for objects.
    """
    texts = [_with_arguments_as_text(message) for message in given]
    options = {"tools": tools, "add_generation_prompt": asks, "tokenize": False}
    try:
        written = tokenizer.apply_chat_template(given, **options)
    except TypeError:
        return texts
    in_python = {
        str(call["function"]["arguments"])
        for message in given
        for call in message.get("tool_calls", [])
        if call["function"]["arguments"]
    }
    if any(arguments in written for arguments in in_python):
        as_texts = tokenizer.apply_chat_template(texts, **options)
        if any(as_texts.count(arguments) < written.count(arguments) for arguments in in_python):
            return texts
    return given


def _refusal(messages: list[Message], error: Exception) -> ValueError:
    roles = ", ".join(message["role"] for message in messages) or "none at all"
    return ValueError(f"The tokenizer's chat template refuses the roles {roles}: {str(error).rstrip('.')}.")


def _given(tokenizer: Any, message: Message, tools: Tools) -> Message:
    given = {key: value for key, value in message.items() if key != "weight"}
    template = _template(tokenizer, tools)
    if given["role"] == "developer" and "developer" not in _names(template):
        given["role"] = "system"
    if _wants_parts(tokenizer, template):
        given["content"] = [{"type": "text", "text": given["content"]}]
    return given


def _template(tokenizer: Any, tools: Tools) -> str:
    return str(tokenizer.get_chat_template(tools=tools))


def _with_arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=64)
def _names(template: str) -> frozenset[str]:
    """The names and strings in a template's code."""
    from jinja2 import Environment

    tokens = Environment().lex(template)  # noqa: S701 - nothing is rendered
    return frozenset(value.strip("\"'") for _, kind, value in tokens if kind in ("name", "string"))


@lru_cache(maxsize=64)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template writes contents that are lists of parts, and drops those that are texts."""

    def written(content: Any) -> bool:
        from jinja2 import TemplateError

        try:
            messages = [{"role": "user", "content": content}]
            return _PROBE in tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            return False

    return not written(_PROBE) and written([{"type": "text", "text": _PROBE}])


def texts_of(message: Message) -> list[str]:
    """What an answer says, in the order in which templates write it, thoughts in its content by themselves."""
    thoughts, _, said = message["content"].rpartition("</think>")
    thoughts = thoughts.rpartition("<think>")[2]
    reasoning = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if key in message), "")
    names = [call["function"]["name"] for call in message.get("tool_calls", [])]
    return [text.strip() for text in (reasoning, thoughts, said, *names) if isinstance(text, str) and text.strip()]


def _thoughts_apart(message: Message) -> Message | None:
    """An answer with the thoughts of its content as a key of their own; ``None`` if there are none."""
    thoughts, _, said = message["content"].rpartition("</think>")
    thoughts = thoughts.rpartition("<think>")[2].strip()
    return {**message, "content": said.strip(), "reasoning_content": thoughts} if thoughts and said.strip() else None


def _with_thoughts(written: str, content: str) -> str:
    """An answer with the thoughts that the template leaves out of its content, as it does in all turns but the next."""
    thoughts, closed, said = content.rpartition("</think>")
    if not closed or not said.strip() or thoughts.rpartition("<think>")[2].strip() in written:
        return written
    place = written.rfind(said.strip())
    return written if place < 0 else written[:place] + content + written[place + len(said.strip()) :]


def _until_stop(tokenizer: Any, written: str, message: Message) -> tuple[str, bool]:
    """An answer without what follows the end of its turn, such as a line break, which is never generated."""
    specials = special_tokens(tokenizer)
    if message.get("tool_calls"):
        answer = written.rstrip()
        return answer, any(answer.endswith(special) for special in specials)
    said, core = texts_of(message)[-1], written.rstrip()
    while ended := [special for special in specials if core.endswith(special)]:
        core = core.removesuffix(max(ended, key=len)).rstrip()
    after = len(core) if core.endswith(said) else core.rfind(said) + len(said)
    ends = [(place, len(special)) for special in specials if (place := written.find(special, after)) >= 0]
    if not ends:
        return written.rstrip(), False
    first = min(place for place, _ in ends)
    return written[: first + max(length for place, length in ends if place == first)], True


@lru_cache(maxsize=64)
def special_tokens(tokenizer: Any) -> set[str]:
    """The texts of tokens such as that which ends a turn."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in (*added, *tokenizer.all_special_tokens) if token}


@lru_cache(maxsize=64)
def _warn_of_open_thoughts(template: str) -> None:
    rank_zero_warn(
        "The tokenizer's chat template begins an answer with <think>, and the rows hold no thoughts: what they answer "
        "is learned as it follows there, without a </think>. Put <think>...</think> in front of the answers if the "
        "model is to think."
    )


@lru_cache(maxsize=64)
def warn_of_no_stop(template: str | None) -> None:
    """Say once that nothing teaches the model to stop."""
    rank_zero_warn(
        f"The tokenizer's {'chat template writes' if template else 'settings name'} no token that ends an answer, so "
        "no stop is learned: the model may go on after its answers. Use a template that ends the assistant's turns."
    )


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
