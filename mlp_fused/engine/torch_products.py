"""The three products of a layer as torch does them best: what runs where torch's library is faster as measured.

Each takes what the launcher of the same product takes, precision and tile apart, and writes the same tensors. Between
product and derivative, or product and activation, a result is rounded to its dtype, as it is in plain torch; float32 is
multiplied as torch's own switch says. Only called where no gradient is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.dropout import Dropout
from ..kernels.launch import Launch
from ..kernels.layer_backward import output_gradient
from ..kernels.layer_forward import pointwise
from .settings import addmm_activation

__all__ = ["dgrad_by_torch", "forward_by_torch", "wgrad_by_torch"]

_HALVES = (torch.float16, torch.bfloat16)  # the dtypes that torch.mm multiplies into float32


def forward_by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    z: Tensor | None,
    activation: Activation,
    again: Launch | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """h = a(x Wᵀ + b), and z = x Wᵀ + b where `z` is given: a product with the bias, then a(·) as one pointwise kernel.

    relu and the identity are one call.

    Args:
        x: (M, K), any strides, as are weight (N, K), of the same dtype, and bias (N,), of any, or None.
        h: (M, N), contiguous, written; z likewise, or None.
        again: what such a call returned before: the launch of its pointwise kernel.
        seed, dropout: as for the kernel; it is the pointwise one that drops.
    """
    dropping = () if seed is None else (seed,)
    product = h if z is None else z
    if bias is None:
        torch.mm(x, weight.t(), out=product)
    else:
        bias = bias if bias.dtype == x.dtype else bias.to(x.dtype)
        if z is None and activation.name == "relu" and dropout is None and x.is_cuda:
            addmm_activation(bias, x, weight.t(), out=h)  # relu in the library's own epilogue
            return None
        torch.addmm(bias, x, weight.t(), out=product)
    if activation.name != "identity" or dropout is not None:
        if again is None or not again(product, h, *dropping):
            return pointwise(product, h, activation, seed=seed, dropout=dropout)
    elif z is not None:
        h.copy_(z)
    return again


def dgrad_by_torch(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    dx: Tensor,
    h: Tensor | None,
    below: Activation,
    again: Launch | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """dx = (dz W) ⊙ a'(saved), and h = a(saved) where `h` is given: a product, then one pointwise kernel.

    Args:
        dz: (M, N), any strides, as is weight (N, K), of the same dtype.
        saved: (M, K), contiguous, what the activation `below` kept; None for the identity.
        dx: (M, K), contiguous, written; h likewise, or None.
        again: as in `forward_by_torch`.
        seed, dropout: of the layer below.
    """
    torch.mm(dz, weight, out=dx)
    if saved is None and dropout is None:
        return None
    dropping = () if seed is None else (seed,)
    if again is None or not again(dx, saved, dx, h, *dropping):
        return output_gradient(dx, saved, dx, below, h=h, seed=seed, dropout=dropout)
    return again


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
