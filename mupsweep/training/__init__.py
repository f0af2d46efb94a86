"""One run: its tensors, its training loop, checkpoints and devices."""
