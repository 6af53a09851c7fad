"""Processes beside a training: the mirror and W&B."""
