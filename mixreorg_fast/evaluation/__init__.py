"""Zero-shot segmentation scores, retrieval, and the pictures of a run.

``datasets.open_dataset`` → ``zero_shot.evaluate`` → ``eval.json``; ``retrieval.retrieval_at_1``;
``pictures.dataset_figure`` and ``pictures.mixing_figure``.
"""
