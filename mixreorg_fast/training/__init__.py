"""Training under DeepSpeed; the loop is in :mod:`.trainer`."""
