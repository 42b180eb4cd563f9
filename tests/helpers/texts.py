"""A tokenizer of whole words with a chat template, and a small model that uses it, for tests about text."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", "system", "user", "assistant", "tool", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def word_tokenizer() -> Any:
    """A tokenizer of :data:`WORDS`, with :data:`TEMPLATE`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.pad_token = "</s>"
    fast.chat_template = TEMPLATE
    return fast


def word_model(**options: Any) -> LlamaForCausalLM:
    """A Llama of two layers over :data:`WORDS`, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )
    return LlamaForCausalLM(config)


def word_checkpoint(folder: Path) -> str:
    """A directory that ``from_pretrained`` opens, with both."""
    word_tokenizer().save_pretrained(folder)
    word_model().save_pretrained(folder)
    return str(folder)
