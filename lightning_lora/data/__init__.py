"""Ready-made data modules for the recipes."""

from lightning_lora.data.prompt_completion import PromptCompletionData

__all__ = ["PromptCompletionData"]
