"""What both paths share around their autograd.Functions: gradients as kernels read them, and differentiated ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.activations import Activation

__all__ = ["plain_gradient", "through", "wants_torch"]


def plain_gradient(dy: Tensor) -> Tensor:
    """dy as kernels read it: dense, in memory as it lies."""
    if dy.layout != torch.strided:
        dy = dy.to_dense()
    elif dy._is_zerotensor():
        dy = dy.clone()
    return dy.resolve_neg()


def wants_torch(gradient: Tensor | None) -> bool:
    """Whether a backward has to be plain torch: it is differentiated itself, or batched by vmap."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    functorch = torch._C._functorch
    return gradient is not None and (
        functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    )


def through(activation: Activation, saved: Tensor, dh: Tensor) -> Tensor:
    """dz = dh a'(z), differentiable in dh and in what was saved."""
    if activation.keeps_preactivation:
        return torch.autograd.grad(activation(saved), saved, dh, create_graph=True)[0]
    assert activation.reference_backward is not None
    return activation.reference_backward(dh, saved, *activation.values)
