"""A run: its identity, folder, checkpoints and counters."""
