"""The multi-layer perceptron as fused Triton kernels: torchvision.ops.MLP's arguments, nn.Sequential's numbers.

from mlp_fused import FusedMLP
model = FusedMLP(784, [512, 512, 10])
"""

from .capture import CapturedStep, capture_step
from .convert import PATTERNS, FuseReport, Pattern, fuse, register_pattern, unfuse
from .engine.ops import decompositions
from .functional import linear_act, mlp
from .kernels.activation import Activation, register_activation
from .kernels.activations import ACTIVATIONS
from .module import FusedLinear, FusedMLP, Pointwise
from .prefetch import DevicePrefetcher

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "PATTERNS",
    "Activation",
    "CapturedStep",
    "DevicePrefetcher",
    "FuseReport",
    "FusedLinear",
    "FusedMLP",
    "Pattern",
    "Pointwise",
    "__version__",
    "capture_step",
    "decompositions",
    "fuse",
    "linear_act",
    "mlp",
    "register_activation",
    "register_pattern",
    "unfuse",
]
