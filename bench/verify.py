"""Compare results with eager's, within the bounds of mlp_fused/agreement.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.rows import Verified
from mlp_fused.agreement import BOUNDS, relative_error


def bounds_in_force(dtype: str) -> tuple[float, float]:
    """BOUNDS of a dtype: those of tf32 for fp32 where torch's switch allows tf32."""
    tf32 = dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return BOUNDS["tf32" if tf32 else dtype]


def compare(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    bounds: tuple[float, float],
    outputs: int,
    mistake: str = "wrong against eager",
) -> Verified:
    """Compare tensors: the first `outputs` by the bound of outputs, the others by the bound of gradients.

    Raises:
        AssertionError: a relative error passes its bound, or a tensor is missing. The text begins with `mistake`.
    """
    assert len(found) == len(expected), f"{len(found)} tensors instead of {len(expected)}"
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    limits = [bounds[0]] * outputs + [bounds[1]] * len(errors[outputs:])
    wrong = [(i, error) for i, (error, limit) in enumerate(zip(errors, limits, strict=True)) if not error <= limit]
    assert not wrong, f"{mistake} (tensor, relative error): {wrong}, bounds {list(bounds)}"
    return Verified(max(errors[:outputs], default=None), max(errors[outputs:], default=None), bounds)
