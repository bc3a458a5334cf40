"""Data: shards of image-text pairs, the tokenizer, the loader, and the embedded scenes.

Nothing is imported here, so that weights load and segment where DALI is not installed.
"""
