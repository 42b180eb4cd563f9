"""Rows of a question and its answer, for a causal language model."""

from lightning_lora.data.chat import ConversationData


class PromptCompletionData(ConversationData):
    """Rows of ``{"prompt": "...", "completion": "..."}``, or in any other layout of conversations, each by itself.

    Each row goes through the chat template of the tokenizer; without one, prompt and completion are joined as they are
    and closed by the end-of-text token. Only the completion counts for the loss (labels are -100 elsewhere). What is
    longer than ``max_length`` loses the end of its completion; without room for a completion, a row is rejected.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    separator = ""
