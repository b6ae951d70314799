"""The package's functions in plain torch: the oracle that the kernels are tested against, and the path on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .kernels.activation import Activation

__all__ = ["Layer", "linear_act", "mlp"]


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """h = a(x Wᵀ + b): x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    return activation(F.linear(x, weight, bias))


def mlp(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[Activation]
) -> Tensor:
    """H_l = a_l(H_{l-1} W_lᵀ + b_l) for every layer l, H_0 = x; returns the last."""
    for weight, bias, activation in zip(weights, biases, activations):
        x = linear_act(x, weight, bias, activation)
    return x


class Layer(NamedTuple):
    """h = a(x Wᵀ + b): weight (N, K), bias (N,) or None; then Dropout, by its probability."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation
    dropout: float = 0.0
