"""What Lightning needs around a run: strategies, resuming, optimizers, launchers."""
