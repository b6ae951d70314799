"""Compare results with eager's, by the bounds of mlp_fused/agreement.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.rows import Verified
from mlp_fused.agreement import BOUNDS, relative_error


def bounds_in_force(dtype: str) -> tuple[float, float]:
    """Return the bounds of a dtype. For fp32 they are those of tf32 if PyTorch's settings allow tf32."""
    tf32 = dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return BOUNDS["tf32" if tf32 else dtype]


def compare(
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    bounds: tuple[float, float],
    outputs: int,
    mistake: str = "wrong against eager",
) -> Verified:
    """Compare tensors with the expected ones.

    Args:
        results, expected: first the outputs, then the gradients.
        bounds: the bounds on relative errors, of outputs and of gradients.
        outputs: the number of outputs.
        mistake: the beginning of the error message.

    Raises:
        AssertionError: a relative error exceeds its bound, or the number of tensors differs.
    """
    assert len(results) == len(expected), f"{len(results)} tensors instead of {len(expected)}"
    errors = [relative_error(*pair) for pair in zip(results, expected, strict=True)]
    limits = [bounds[0]] * outputs + [bounds[1]] * len(errors[outputs:])
    wrong = [(i, error) for i, (error, limit) in enumerate(zip(errors, limits, strict=True)) if not error <= limit]
    assert not wrong, f"{mistake} (tensor, relative error): {wrong}, bounds {list(bounds)}"
    return Verified(max(errors[:outputs], default=None), max(errors[outputs:], default=None), bounds)
