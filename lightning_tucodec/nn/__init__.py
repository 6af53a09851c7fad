"""Networks in pure PyTorch."""
