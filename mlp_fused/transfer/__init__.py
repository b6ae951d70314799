"""`mlp-fused transfer`: how long the work takes, how long moving the data takes, and when the GPU is worth it."""

from .config import Config, run
from .findings import Crossing, OnCpu, OnGpu, Point, Transfer, crossing
from .measurement import Gpu, copy_calls, measure

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
