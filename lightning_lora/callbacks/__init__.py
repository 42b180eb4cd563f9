"""Callbacks for use beside ``LoRA``."""
