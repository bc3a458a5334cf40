"""The embedded data set: drawn scenes with captions and exact masks."""
