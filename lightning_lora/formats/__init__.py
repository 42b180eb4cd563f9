"""Files: how adapters, checkpoints and merged models are written and read."""
