"""The command ``lightning-lora``.

What helps, lists and reads arguments here imports nothing heavy: PyTorch and Lightning come in when a command works.
"""
