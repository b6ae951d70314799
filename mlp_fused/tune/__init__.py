"""`mlp-fused tune`: measure which tile, and which path, is the fastest on this GPU."""

from .tuner import ANCHORS, GRID, Config, Family, Workload, tune

__all__ = ["ANCHORS", "GRID", "Config", "Family", "Workload", "tune"]
