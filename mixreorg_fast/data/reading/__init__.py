"""From shards to training batches: the order of samples, augmentation, decoding with DALI, the loaders."""
