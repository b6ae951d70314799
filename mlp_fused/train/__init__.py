"""`mlp-fused train` trains a network on a file of arrays. `mlp-fused predict` predicts with it."""

from .config import Config, build_model, build_torch_model
from .loop import Result, train

__all__ = ["Config", "Result", "build_model", "build_torch_model", "train"]
