"""Photos and class names in, labels out.

``segmenter.Segmenter`` (photos to labels) → ``segmenter.Segmentation`` (labels, areas, scores, pictures); the settings
are :class:`mixreorg_fast.config.InferenceConfig`.
"""
