"""`mlp-fused train` and `mlp-fused predict`: train a network on a file of arrays, and use it."""

from .config import Config, build_model, build_torch_model
from .loop import Result, train

__all__ = ["Config", "Result", "build_model", "build_torch_model", "train"]
