"""`mlp-fused tune`: measure which tile, and which path, is the fastest on this GPU."""

from .config import Config
from .tuner import tune

__all__ = ["Config", "tune"]
