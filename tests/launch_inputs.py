"""Activations, a dtype, and a function for gradients, for tests of launches."""

from __future__ import annotations

import torch
from torch import Tensor

from mlp_fused import ACTIVATIONS

GELU, RELU, SILU, IDENTITY = (ACTIVATIONS[name] for name in ("gelu", "relu", "silu", "identity"))


BF16 = torch.bfloat16


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not y.requires_grad:
        return []
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float32, device=y.device).view_as(y).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, dy))
