"""`mlp-fused transfer`: measure the time of a network's work and of its data transfer, and compare GPU and CPU."""

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
