"""The three products of a layer by torch, for products that torch computes faster than our kernels.

A function here writes the same tensors as the kernel of the same product, but without activation or derivative (except
`linear_relu_by_torch`). These follow in a pointwise kernel. Between the two, the result is rounded to its dtype, as in
plain torch. float32 follows torch's own switch. The functions are called only while no gradient is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import addmm_activation, linear

_HALVES = (torch.float16, torch.bfloat16)  # the dtypes that torch.mm multiplies into float32


def linear_by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    """z = x Wᵀ + b.

    Args:
        x, weight: (M, K) and (N, K), any strides, the same dtype.
        bias: (N,), any stride and dtype; or None.
        z: (M, N), contiguous, written.
    """
    linear(x, weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype), out=z)


def linear_relu_by_torch(x: Tensor, weight: Tensor, bias: Tensor, h: Tensor) -> None:
    """h = relu(x Wᵀ + b) on a GPU, with relu in the epilogue of torch's library. Arguments as in `linear_by_torch`."""
    addmm_activation(bias if bias.dtype == x.dtype else bias.to(x.dtype), x, weight.t(), out=h)


def cast_by_torch(weight: Tensor, cast: Tensor) -> None:
    """Copy a weight into a tensor of another dtype."""
    cast.copy_(weight)


def zeros_by_torch(total: Tensor) -> None:
    """Write zeros: the sum over no rows."""
    total.zero_()


def dgrad_by_torch(dz: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx = dz W.

    Args:
        dz, weight: (M, N) and (N, K), any strides, the same dtype.
        dx: (M, K), contiguous, written.
    """
    torch.mm(dz, weight, out=dx)


def wgrad_by_torch(dz: Tensor, h: Tensor | None, dw: Tensor | None, db: Tensor | None) -> None:
    """dW = dzᵀ h if `dw` is given, and db = Σ_rows dz if `db` is.

    Args:
        dz: (M, N), any strides; M may be 0, which gives zeros.
        h: (M, K), any strides, dz's dtype; None if only db is wanted.
        dw: (N, K), contiguous, written, of any float dtype; or None. db: (N,), as dw.
    """
    if dw is not None:
        assert h is not None
        if dw.dtype == dz.dtype:
            torch.mm(dz.t(), h, out=dw)
        elif dw.dtype == torch.float32 and dz.dtype in _HALVES and dz.is_cuda and torch.version.hip is None:
            # The accumulators are fp32 anyway, so nothing is rounded.
            torch.mm(dz.t(), h, out_dtype=torch.float32, out=dw)
        else:
            dw.copy_(torch.mm(dz.t(), h))
    if db is not None:
        if torch.promote_types(dz.dtype, db.dtype) == db.dtype:
            torch.sum(dz, 0, dtype=db.dtype, out=db)
        else:
            db.copy_(dz.sum(0))
