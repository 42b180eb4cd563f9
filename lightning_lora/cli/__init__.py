"""The command ``lightning-lora``."""
