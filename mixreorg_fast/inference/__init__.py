"""Photos and class names in, labels out.

``model.load`` (the network with its tokenizer and settings) → ``segmenter.Segmenter`` (photos to labels) →
``Segmentation`` (labels, areas, scores, pictures); the settings are
:class:`mixreorg_fast.config.InferenceConfig`.
"""
