"""A configuration holds a whole run: model, method, data, optimisation, evaluation.

``load_config("configs/zero2.json", ["train.steps=100"])`` reads, overrides and validates; every mistake of a user ends
in a :class:`~mixreorg_fast.errors.UserError` of one line. The defaults are the paper-scale setting (GroupViT, CVPR
2022, section 4.1 and its supplement; "ours" marks what MixReorg leaves open).
"""

# ruff: noqa: F401

from .data import AugmentConfig, CacheConfig, DataConfig, ScenesConfig, are_scenes
from .files import find_config, flattened, load_config, merged, packaged_configs, parse_config, read_object
from .model import ModelConfig, TextConfig
from .run import Config, EvalConfig, EvalDatasetConfig, InferenceConfig, TrainConfig
from .section import NonNegative, Section, describe, validated
