"""Bounds, by dtype, for the relative error (in the norm) between two correct results."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["BOUNDS", "relative_error"]

# Bounds on the relative error against torch in the same dtype: (for an output or a single product, for the gradients of
# a network). Both sides round, so this does not measure accuracy; the tests do. A wrong index or a lost block differs
# by far more. The bound of fp32 gradients is wide, because rounding may move a pre-activation across relu's kink. This
# happens to one in 10^6 entries, which is 10^-3 of the norm. tf32 has as many bits of mantissa as fp16.
BOUNDS = {"fp32": (2e-5, 5e-3), "tf32": (5e-3, 2e-2), "fp16": (5e-3, 2e-2), "bf16": (3e-2, 6e-2)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float32; infinity for a wrong shape, NaN where either tensor has one."""
    if actual.shape != expected.shape:
        return math.inf
    expected = expected.detach().float()
    difference = (actual.detach().float() - expected).norm().item()
    return difference / (expected.norm().item() or 1.0) if difference else 0.0
