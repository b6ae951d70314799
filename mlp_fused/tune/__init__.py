"""`mlp-fused tune`: measure which tiles and paths are fastest on this GPU."""

from .config import Config
from .tuner import tune

__all__ = ["Config", "tune"]
