"""A tokenizer as the entries of a GGUF file, by which llama.cpp makes the same tokens of a text."""

import json
from pathlib import Path
from typing import Any

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How llama.cpp splits a text before it is made into tokens, by its name for that: the steps as the tokenizers library
# has them, and whether a word that is a token as a whole is left whole.
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_*
_SPLITS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "llama-bpe": ([{"type": "Split", "pattern": {"Regex": _WORDS % "{1,3}"}}, {"type": "ByteLevel"}], True),
    "qwen2": ([{"type": "Split", "pattern": {"Regex": _WORDS % ""}}, {"type": "ByteLevel"}], False),
    "smollm": ([{"type": "Digits"}, {"type": "ByteLevel", "use_regex": True}], False),
    "gpt-2": ([{"type": "ByteLevel", "use_regex": True}], False),
}
# What a step is where it does not say more.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Split": {"behavior": "Isolated", "invert": False},
    "ByteLevel": {"add_prefix_space": False, "use_regex": False},
    "Digits": {"individual_digits": True},
}
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


def tokenizer_entries(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The entries of a tokenizer by their keys.

    Args:
        tokenizer: A fast tokenizer of transformers, which merges pairs of bytes, or the path of a GGUF file that has
            the entries.
        rows: How many rows the embedding has; those without a token get one that is not used.

    Raises:
        ValueError: If llama.cpp would make other tokens of a text, or the embedding has fewer rows.
    """
    if isinstance(tokenizer, Path):
        return _entries_in(tokenizer, rows)
    from gguf import Keys, TokenType

    keys = Keys.Tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"A {type(tokenizer).__name__} has no tokenizer.json, from which it could be written.")
    parts = json.loads(backend.to_str())
    model, split = parts["model"], _split(parts)
    added = tokenizer.added_tokens_decoder
    texts = {number: text for text, number in model["vocab"].items()} | {n: token.content for n, token in added.items()}
    if max(texts) >= rows:
        raise ValueError(f"The tokenizer has a token {max(texts)}, and the embedding {rows} rows.")
    kinds = {n: TokenType.CONTROL if token.special else TokenType.USER_DEFINED for n, token in added.items()}
    unused = {number: TokenType.UNUSED for number in range(rows) if number not in texts}
    entries: dict[str, Any] = {
        keys.MODEL: "gpt2",
        keys.PRE: split,
        keys.LIST: [texts.get(number, f"[PAD{number}]") for number in range(rows)],
        keys.TOKEN_TYPE: [int((kinds | unused).get(number, TokenType.NORMAL)) for number in range(rows)],
        keys.MERGES: [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
    }
    for name in _SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            entries[getattr(keys, f"{name.upper()}_ID")] = number
    made = tokenizer("a").input_ids
    entries[keys.ADD_BOS] = made[:1] == [tokenizer.bos_token_id]
    entries[keys.ADD_EOS] = made[-1:] == [tokenizer.eos_token_id]
    template = tokenizer.chat_template
    if template:
        entries[keys.CHAT_TEMPLATE] = template if isinstance(template, str) else template["default"]
    return entries


def _entries_in(path: Path, rows: int) -> dict[str, Any]:
    from gguf import GGUFReader, Keys

    fields = GGUFReader(path).fields
    entries = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    tokens = len(entries.get(Keys.Tokenizer.LIST, []))
    if tokens != rows:
        raise ValueError(f"{path} has a tokenizer of {tokens} tokens, and the model an embedding of {rows} rows.")
    return entries


def _split(parts: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits texts.

    Raises:
        ValueError: Naming what it does otherwise.
    """
    model, normalizer = parts["model"], parts["normalizer"] or {"type": "NFC"}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']}{' with byte_fallback' * bool(model.get('byte_fallback'))}"
        raise ValueError(f"The tokenizer is {kind}, and only those that merge pairs of bytes are written as GGUF.")
    if normalizer["type"] != "NFC":  # which llama.cpp leaves out, for what has that form already
        raise ValueError(f"The tokenizer changes texts first ({normalizer['type']}), and llama.cpp does not.")
    first = parts["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    steps = [_without_offsets(step) for step in first.get("pretokenizers", [first])]
    for name, (known, leaves_words) in _SPLITS.items():
        whole = [{**_DEFAULTS[step["type"]], **step} for step in known]
        if steps == whole and leaves_words == bool(model.get("ignore_merges")):
            return name
    raise ValueError(
        f"The tokenizer splits texts in another way than {', '.join(_SPLITS)}, which are known here: "
        f"{json.dumps(first)[:200]}, ignore_merges={bool(model.get('ignore_merges'))}."
    )


def _without_offsets(step: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if name != "trim_offsets"}
