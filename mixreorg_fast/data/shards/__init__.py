"""WebDataset shards on disk: reading, building from other layouts, verifying."""
