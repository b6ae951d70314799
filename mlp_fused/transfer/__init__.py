"""`mlp-fused transfer`: how long the work takes, how long moving the data takes, and when the GPU is worth it."""

from .measurement import Config, Crossing, Gpu, OnCpu, OnGpu, Point, Transfer, copy_calls, crossing, measure, run

__all__ = [
    "Config",
    "Crossing",
    "Gpu",
    "OnCpu",
    "OnGpu",
    "Point",
    "Transfer",
    "copy_calls",
    "crossing",
    "measure",
    "run",
]
