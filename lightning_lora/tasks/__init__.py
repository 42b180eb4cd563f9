"""Ready-made LightningModules for the recipes, and the losses of language models for modules of one's own."""

from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.dpo import DPO
from lightning_lora.tasks.image_classification import ImageClassification
from lightning_lora.tasks.label_losses import label_losses, language_model_loss
from lightning_lora.tasks.prefix import PrefixCausalLM
from lightning_lora.tasks.reward_model import RewardModel
from lightning_lora.tasks.sentence_embedding import SentenceEmbedding
from lightning_lora.tasks.seq2seq import Seq2Seq
from lightning_lora.tasks.sequence_classification import SequenceClassification
from lightning_lora.tasks.token_classification import TokenClassification

__all__ = [
    "DPO",
    "CausalLM",
    "ImageClassification",
    "PrefixCausalLM",
    "RewardModel",
    "SentenceEmbedding",
    "Seq2Seq",
    "SequenceClassification",
    "TokenClassification",
    "label_losses",
    "language_model_loss",
]
