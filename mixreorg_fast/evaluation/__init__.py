"""Zero-shot segmentation scores, retrieval, and the pictures of a run."""
