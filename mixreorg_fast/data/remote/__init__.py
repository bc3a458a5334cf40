"""Shards by name: fetched from the Hugging Face hub, S3 or a web server ahead of the run, and kept in a cache."""
