"""LightningDataModules and loaders that the recipes use."""

from lightning_lora.data.chat import ChatData
from lightning_lora.data.prompt_completion import PromptCompletionData
from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader

__all__ = ["ChatData", "EpochSampler", "PromptCompletionData", "ResumableDataLoader"]
