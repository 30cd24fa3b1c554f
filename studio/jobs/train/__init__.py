"""Training: base, adapter, loop, guards, checkpoints."""
