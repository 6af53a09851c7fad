"""Sets of images under one budget."""
