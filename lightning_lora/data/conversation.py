"""From a conversation to tokens of which the assistant's alone are learned."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Literal

from lightning_lora.data.chat_template import (
    Exchange,
    Tools,
    exchange,
    generated,
    has_generation_marks,
    render,
    require_written,
    texts_of,
    warn_of_no_stop,
)
from lightning_lora.data.messages import Message
from lightning_lora.data.special_tokens import around

Row = dict[str, list[int]]
TrainOn = Literal["all", "last"]

IGNORED = -100  # the label of a token that does not count for the loss


class RewrittenTurnsError(ValueError):
    """A chat template writes a turn of the assistant differently once others follow."""

    def __init__(self) -> None:
        super().__init__(
            "The tokenizer's chat template writes a turn of the assistant differently once others follow, so that one "
            "row cannot hold all answers as the model would be asked for them."
        )


def encode_turns(
    tokenizer: Any,
    messages: list[Message],
    max_length: int,
    tools: Tools = None,
    train_on: TrainOn = "all",
    separator: str = "\n",
) -> list[tuple[Row | None, bool]]:
    """The rows that teach all answers of a conversation: one, or one for each answer.

    It is one for each answer, with all that came before it, where the chat template writes earlier turns differently
    from the last, as those do that leave out what was thought in them. The arguments are those of
    :func:`encode_conversation`.
    """
    require_written(tokenizer, messages, tools)
    answers = [index for index, message in enumerate(messages) if _learned(messages, index)]
    if train_on == "all":
        try:
            return [encode_conversation(tokenizer, messages, max_length, tools, separator=separator)]
        except RewrittenTurnsError:
            pass
    else:
        answers = answers[-1:]
    return [
        encode_conversation(tokenizer, messages[: index + 1], max_length, tools, "last", separator) for index in answers
    ]


def encode_conversation(
    tokenizer: Any,
    messages: list[Message],
    max_length: int,
    tools: Tools = None,
    train_on: TrainOn = "all",
    separator: str = "\n",
) -> tuple[Row | None, bool]:
    """Token ids and labels of a conversation in one row, and whether it had to be truncated.

    The labels are the tokens that the assistant writes, with the token that closes the turn, and :data:`IGNORED`
    elsewhere. What follows the last of them is left out, since nothing there is learned, and so are the labels of
    answers whose weight is 0. A conversation that is too long loses its oldest exchanges first (a system message stays;
    an exchange goes from a question to the next, with the calls of tools between), and then its end. Where the last
    question alone leaves no room for an answer, there is no row.

    Args:
        tokenizer: One of transformers. Without a chat template, the contents are joined by ``separator``, and each of
            the assistant's is closed by the end-of-text token.
        messages: At least one of them the assistant's, after another.
        max_length: Longest row, in tokens, at least 2.
        tools: Descriptions of the tools that the assistant may call.
        train_on: Whether ``"all"`` answers are learned, or the ``"last"`` alone.
        separator: What joins contents where there is no chat template. Default a line break.

    Raises:
        MessageError: If the chat template leaves out what a message says.
        RewrittenTurnsError: If it writes a turn differently once others follow, and more than one is learned.
        ValueError: If it refuses the messages.
    """
    last = max((index for index in range(len(messages)) if _learned(messages, index)), default=None)
    if last is None:
        raise ValueError("found no answer that could be learned, expected one that follows a message.")
    messages = messages[: last + 1]
    newest = _newest(messages, lambda left: _length(tokenizer, left, tools, separator) <= max_length)
    ids, learned = _encode(tokenizer, newest, tools, train_on, separator)
    truncated = len(newest) < len(messages) or len(ids) > max_length
    ids, learned = ids[:max_length], learned[:max_length]
    # The first token of a row is never predicted.
    learned[:1] = [False]
    if not any(learned):
        return None, True
    end = len(learned) - learned[::-1].index(True)
    return _row(ids[:end], learned), truncated


def _row(ids: list[int], learned: list[bool]) -> Row:
    return {"input_ids": ids, "labels": [token if on else IGNORED for token, on in zip(ids, learned)]}


def encode_text(tokenizer: Any, text: str, max_length: int) -> list[tuple[Row | None, bool]]:
    """A text that is learned as it is, with the end-of-text token, in as many rows as it takes."""
    ids = [*around(tokenizer)[0], *_ids(tokenizer, text + (tokenizer.eos_token or ""))]
    parts = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    # The first token of a row is never predicted.
    return [({"input_ids": part, "labels": [IGNORED, *part[1:]]}, False) for part in parts if len(part) > 1]


def encode_answers(
    tokenizer: Any, question: list[Message], answers: list[Message], max_length: int, tools: Tools = None
) -> tuple[list[Row] | None, bool]:
    """Several answers to one question, each in a row with the same tokens before it, and whether anything was cut.

    Older exchanges are left out until the longest answer fits; then answers lose their end. Where the question alone
    leaves no room for an answer, there are no rows.

    Raises:
        MessageError: If the chat template leaves out what a message says.
        ValueError: If it refuses the messages.
    """
    for answer in answers:
        require_written(tokenizer, [*question, answer], tools)

    def fits(left: list[Message]) -> bool:
        return all(_length(tokenizer, [*left, answer], tools, "\n") <= max_length for answer in answers)

    newest = _newest(question, fits)
    found = [_encode(tokenizer, [*newest, answer], tools, "last", "\n") for answer in answers]
    truncated = len(newest) < len(question) or max(len(ids) for ids, _ in found) > max_length
    rows = [_row(ids[:max_length], learned) for ids, learned in found]
    if not all(any(label != IGNORED for label in row["labels"]) for row in rows):
        return None, True
    return rows, truncated


def encode_question(tokenizer: Any, messages: list[Message], tools: Tools = None, separator: str = "\n") -> list[int]:
    """Token ids of the messages up to where the assistant's next answer begins.

    Raises:
        ValueError: If the chat template refuses the messages.
    """
    if tokenizer.chat_template:
        return _ids(tokenizer, render(tokenizer, messages, tools, add_generation_prompt=True))
    pieces = _joined(tokenizer, [*messages, {"role": "assistant", "content": "-"}], separator)
    return [*around(tokenizer)[0], *_ids(tokenizer, "".join(text for text, _ in pieces[:-1]))]


def _learned(messages: list[Message], index: int) -> bool:
    """Whether a message is an answer that is to be learned; what opens a conversation answers nothing."""
    return index > 0 and messages[index]["role"] == "assistant" and messages[index].get("weight") != 0


def _newest(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """The messages without as few of the oldest exchanges as it takes to fit; the newest stays in any case.

    An exchange begins at a question, not at the result of a tool.
    """
    roles = ["", *(message["role"] for message in messages)]
    starts = [index for index in range(len(messages)) if roles[index + 1] == "user" != roles[index]]
    if len(starts) < 2 or fits(messages):
        return messages
    system = [message for message in messages[: starts[0]] if message["role"] in ("system", "developer")]
    left = [[*system, *messages[start:]] for start in starts[1:]]
    return left[min(bisect_left(left, True, key=fits), len(left) - 1)]


def _length(tokenizer: Any, messages: list[Message], tools: Tools, separator: str) -> int:
    if tokenizer.chat_template:
        return len(_ids(tokenizer, render(tokenizer, messages, tools).rstrip()))
    return len(_ids(tokenizer, "".join(text for text, _ in _joined(tokenizer, messages, separator))))


def _encode(
    tokenizer: Any, messages: list[Message], tools: Tools, train_on: TrainOn, separator: str
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are learned."""
    if not tokenizer.chat_template:
        pieces = _joined(tokenizer, messages, separator)
        if not tokenizer.eos_token:
            warn_of_no_stop(None)
        if train_on == "last":
            pieces = [(text, on and index == len(pieces) - 1) for index, (text, on) in enumerate(pieces)]
        ids, learned = _tokenize(tokenizer, pieces)
        opening = around(tokenizer)[0]  # what it puts behind a text has no place before an answer
        return opening + ids, [False] * len(opening) + learned
    if has_generation_marks(tokenizer, tools) and (found := _marked(tokenizer, messages, tools, train_on)):
        return found
    return _tokenize(tokenizer, _templated(tokenizer, messages, tools, train_on))


def _templated(tokenizer: Any, messages: list[Message], tools: Tools, train_on: TrainOn) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    done = ""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    for index in answers[-1:] if train_on == "last" else answers:
        if train_on == "all" and not _learned(messages, index):
            continue
        found: Exchange = exchange(tokenizer, messages[: index + 1], tools)
        if not found.asked.startswith(done):
            raise RewrittenTurnsError
        if not found.stops:
            warn_of_no_stop(tokenizer.chat_template)
        pieces += [(found.asked[len(done) :], False), (found.answer, True)]
        done = found.asked + found.answer
    return pieces


def _marked(
    tokenizer: Any, messages: list[Message], tools: Tools, train_on: TrainOn
) -> tuple[list[int], list[bool]] | None:
    """As the chat template marks it, where it marks each answer by itself."""
    ids, marks = generated(tokenizer, messages, tools)
    starts = [index for index, on in enumerate(marks) if on and not (index and marks[index - 1])]
    ends = [index + 1 for index, on in enumerate(marks) if on and marks[index + 1 : index + 2] != [True]]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(starts) != len(answers):
        return None
    for index, start, end in zip(answers, starts, ends):
        written = "".join(tokenizer.decode(ids[start:end]).split())
        if any("".join(text.split()) not in written for text in texts_of(messages[index])):
            return None
        if (train_on == "last" and index != answers[-1]) or not _learned(messages, index):
            marks[start:end] = [False] * (end - start)
        # A line break after the end of a turn is never generated.
        while end > start + 1 and tokenizer.decode(ids[end - 1]).isspace():
            end -= 1
            marks[end] = False
        if ids[end - 1] not in tokenizer.all_special_ids:
            warn_of_no_stop(tokenizer.chat_template)
    return ids, marks


def _joined(tokenizer: Any, messages: list[Message], separator: str) -> list[tuple[str, bool]]:
    texts: list[tuple[str, bool]] = []
    waiting = ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index:
            learned = message.get("weight") != 0
            texts += [(waiting, False), (message["content"] + (tokenizer.eos_token or ""), learned)]
            waiting = separator
        else:
            waiting += message["content"] + separator
    return texts


def _tokenize(tokenizer: Any, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Token ids of pieces of a text, and which of them are of pieces that are learned.

    The text is tokenized whole, once, as its beginning was when the model was asked. Where a token would reach over the
    end of a piece, each piece is tokenized by itself, as an answer is when the model is used.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
        ends, end = [], 0
        for text, _ in pieces:
            end += len(text)
            ends.append(end)
        owners = [bisect_left(ends, max(stop, 1)) for _, stop in found["offset_mapping"]]
        within = all(
            start >= (ends[owner - 1] if owner else 0) or start == stop
            for owner, (start, stop) in zip(owners, found["offset_mapping"])
        )
        if within and owners == sorted(owners):
            return list(found["input_ids"]), [pieces[owner][1] for owner in owners]
    ids: list[int] = []
    learned: list[bool] = []
    for text, on in pieces:
        mine = _ids(tokenizer, text)
        ids += mine
        learned += [on] * len(mine)
    return ids, learned


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
