"""Ready-made LightningModules for the recipes."""

from lightning_lora.tasks.causal_lm import CausalLM

__all__ = ["CausalLM"]
