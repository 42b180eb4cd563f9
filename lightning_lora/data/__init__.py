"""LightningDataModules and loaders that the recipes use."""

from lightning_lora.data.chat import ChatData
from lightning_lora.data.images import ImageData
from lightning_lora.data.labelled_text import LabelledTextData
from lightning_lora.data.preferences import PreferenceData
from lightning_lora.data.prompt_completion import PromptCompletionData
from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader
from lightning_lora.data.rewards import RewardData
from lightning_lora.data.sentence_pairs import SentencePairData
from lightning_lora.data.seq2seq import Seq2SeqData
from lightning_lora.data.tagged_words import TaggedWordsData

__all__ = [
    "ChatData",
    "EpochSampler",
    "ImageData",
    "LabelledTextData",
    "PreferenceData",
    "PromptCompletionData",
    "ResumableDataLoader",
    "RewardData",
    "SentencePairData",
    "Seq2SeqData",
    "TaggedWordsData",
]
