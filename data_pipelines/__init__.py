"""From folders of images to WebDataset shards."""
