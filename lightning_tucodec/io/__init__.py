"""Files, images, storage, processes."""
