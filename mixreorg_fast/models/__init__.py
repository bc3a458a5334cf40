"""GroupViT and MixReorg."""

from .groupvit import GroupViT, Segments
from .mixreorg import Batch, MixReorg

__all__ = ["Batch", "GroupViT", "MixReorg", "Segments"]
