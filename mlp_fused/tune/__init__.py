"""`mlp-fused tune`: measure which tile, and which path, is the fastest on this GPU."""

from .config import ANCHORS, GRID, Config, Family, Workload
from .tuner import tune

__all__ = ["ANCHORS", "GRID", "Config", "Family", "Workload", "tune"]
