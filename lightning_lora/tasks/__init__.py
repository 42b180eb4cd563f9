"""Ready-made LightningModules for the recipes."""

from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.sequence_classification import SequenceClassification
from lightning_lora.tasks.token_classification import TokenClassification

__all__ = ["CausalLM", "SequenceClassification", "TokenClassification"]
