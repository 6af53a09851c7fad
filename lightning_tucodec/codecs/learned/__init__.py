"""The VAE codec and its models."""
