"""The three products of a layer as torch does them best: what runs where torch's library is faster as measured.

Each writes the tensors that the kernel of the same product writes, but for what is done element by element: activations
and derivatives follow as a kernel of their own. Between the two a result is rounded to its dtype, as it is in plain
torch; float32 is multiplied as torch's own switch says. Only called where no gradient is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import addmm_activation

__all__ = [
    "cast_by_torch",
    "dgrad_by_torch",
    "linear_by_torch",
    "linear_relu_by_torch",
    "wgrad_by_torch",
    "zeros_by_torch",
]

_HALVES = (torch.float16, torch.bfloat16)  # the dtypes that torch.mm multiplies into float32


def linear_by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    """z = x Wᵀ + b.

    Args:
        x: (M, K), any strides, as are weight (N, K), of the same dtype, and bias (N,), of any, or None.
        z: (M, N), contiguous, written.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=z)
    else:
        torch.addmm(bias if bias.dtype == x.dtype else bias.to(x.dtype), x, weight.t(), out=z)


def linear_relu_by_torch(x: Tensor, weight: Tensor, bias: Tensor, h: Tensor) -> None:
    """h = relu(x Wᵀ + b) on a GPU, with relu in the library's own epilogue; as `linear_by_torch`."""
    addmm_activation(bias if bias.dtype == x.dtype else bias.to(x.dtype), x, weight.t(), out=h)


def cast_by_torch(weight: Tensor, cast: Tensor) -> None:
    """A weight in another dtype."""
    cast.copy_(weight)


def zeros_by_torch(total: Tensor) -> None:
    """A sum over no rows."""
    total.zero_()


def dgrad_by_torch(dz: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx = dz W.

    Args:
        dz: (M, N), any strides, as is weight (N, K), of the same dtype.
        dx: (M, K), contiguous, written.
    """
    torch.mm(dz, weight, out=dx)


def wgrad_by_torch(dz: Tensor, h: Tensor | None, dw: Tensor | None, db: Tensor | None) -> None:
    """dW = dzᵀ h and db = Σ_rows dz, each where it is given.

    Args:
        dz: (M, N), any strides; M may be 0, which gives zeros.
        h: (M, K), any strides, dz's dtype; None where only db is wanted.
        dw: (N, K), contiguous, written, of any float dtype; db (N,) likewise.
    """
    if dw is not None:
        assert h is not None
        if dw.dtype == dz.dtype:
            torch.mm(dz.t(), h, out=dw)
        elif dw.dtype == torch.float32 and dz.dtype in _HALVES and dz.is_cuda and torch.version.hip is None:
            torch.mm(dz.t(), h, out_dtype=torch.float32, out=dw)  # the sums are fp32 already: nothing is rounded
        else:
            dw.copy_(torch.mm(dz.t(), h))
    if db is not None:
        if torch.promote_types(dz.dtype, db.dtype) == db.dtype:
            torch.sum(dz, 0, dtype=db.dtype, out=db)
        else:
            db.copy_(dz.sum(0))
