"""Small tokenizers that merge pairs of bytes, by the ways in which those of known models split texts."""

from typing import Any

import tokenizers as tk
from transformers import PreTrainedTokenizerFast

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = [
    "The quick brown fox jumps over 1234 lazy dogs; isn't it?\n\n",
    "  don't    WE'LL 56 héllo wörld 日本語 🙂\tx_y=z()",
]
SPLITS = ("llama-bpe", "qwen2", "smollm", "gpt-2")


def byte_pairs(split: str, rows: int = 320, **values: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of up to so many tokens, trained on a few words, that splits texts as llama.cpp's name says."""
    pre = tk.pre_tokenizers
    first: dict[str, list[Any]] = {
        "llama-bpe": [pre.Split(tk.Regex(_WORDS % "{1,3}"), "isolated"), pre.ByteLevel(False, use_regex=False)],
        "qwen2": [pre.Split(tk.Regex(_WORDS % ""), "isolated"), pre.ByteLevel(False, use_regex=False)],
        "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(False)],
        "gpt-2": [pre.ByteLevel(False)],
    }
    made = tk.Tokenizer(tk.models.BPE(ignore_merges=split == "llama-bpe"))
    made.pre_tokenizer = first[split][0] if len(first[split]) == 1 else pre.Sequence(first[split])
    made.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=rows,
        min_frequency=1,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|begin|>"],
        show_progress=False,
    )
    made.train_from_iterator(_TEXTS * 4, trainer)
    given = {"eos_token": "<|end|>", "bos_token": "<|begin|>", **values}
    return PreTrainedTokenizerFast(tokenizer_object=made, **given)
