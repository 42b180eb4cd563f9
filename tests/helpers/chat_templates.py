"""Chat templates of the kinds that models have, and a tokenizer of bytes that takes any of them.

Each is written after a model's documentation, as short as what it is here for allows.
"""

import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' '"
    " + (call.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
)
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
)

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + _CHATML_PROMPT,
    # Qwen2.5: calls of tools.
    "tools": _TOOLS
    + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _CHATML_PROMPT,
    # Qwen3: thoughts of the last answer alone.
    "qwen3": _TOOLS + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content or '' %}"
    "{% set thoughts = m.reasoning_content or '' %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}" + _CALLS + "{{ '<|im_end|>\n' }}{% endfor %}" + _CHATML_PROMPT,
    # DeepSeek-R1: the question opens the thoughts, earlier ones are left out.
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1].lstrip() + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    # Qwen3.5: the question opens the thoughts, and each last answer closes them.
    "closing": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
    "{% endif %}{{ m.content.split('</think>')[-1].lstrip() }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # Phi-3.5: an end of text behind all turns.
    "phi": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    # Llama 3: contents without the blanks around them.
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # Mistral: no prompt for an answer, no system message.
    "mistral": "{{ bos_token }}" + _ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    # Gemma: another name for the assistant.
    "gemma": "{{ bos_token }}" + _ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role)"
    " + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # SmolVLM, Idefics3: contents are lists of parts, and texts are dropped.
    "parts": "{% for m in messages %}{{ m.role | capitalize + ':' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ ' ' + part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    # gpt-oss: channels, another end of the last turn, results of tools as JSON, developer in place of system.
    "channels": "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% if loop.last and m.thinking %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>'"
    " + (m.content | tojson if m.role == 'tool' else m.content) + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    # GLM-4.5: nothing ends a turn.
    "endless": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Marks by itself what is generated; writes thoughts in all turns.
    "marked": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' }}"
    "{{ m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _CHATML_PROMPT,
}
_SPECIAL = re.compile(r"<\|\w+\|>|<\w+_of_\w+>|\[/?INST\]")


def byte_tokenizer(template: str | None = None, special: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes, with a chat template and special tokens for all that look like some in it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    roles = ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    found = sorted({*_SPECIAL.findall(template or ""), *roles, *special})
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>", "<pad>", *found],
        initial_alphabet=bpe.pre_tokenizer.alphabet(),
    )
    bpe.train_from_iterator(["hello world"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=found,
    )
    tokenizer.chat_template = template
    return tokenizer


def marked(tokenizer: Any, row: dict[str, list[int]]) -> str:
    """The text of a row, with « and » around what is learned."""
    text, on = "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if (label != -100) != on:
            on = not on
            text += "«" if on else "»"
        text += tokenizer.decode([token])
    return text + ("»" if on else "")
