"""Training under DeepSpeed: one module a concern, strung together in :mod:`.trainer`."""
