"""The multi-layer perceptron as fused Triton kernels: nn.Sequential's arguments, checkpoints and numbers.

from mlp_fused import FusedMLP
model = FusedMLP(784, [512, 512, 10])
"""

from .functional import linear_act, mlp
from .graphs import CapturedStep, capture_step
from .kernels.activations import ACTIVATIONS, Activation, register_activation
from .module import FusedLinear, FusedMLP, Pointwise

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "CapturedStep",
    "FusedLinear",
    "FusedMLP",
    "Pointwise",
    "__version__",
    "capture_step",
    "linear_act",
    "mlp",
    "register_activation",
]
