"""Side by side with PEFT, full fine-tuning and the floor: run as ``python -m benchmarks.<name>``."""
