"""The embedded dataset: drawn scenes with captions and exact masks."""
