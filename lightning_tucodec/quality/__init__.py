"""Distortion measures and rate-distortion curves."""
