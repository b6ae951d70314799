"""A model that `fuse` is tested on, and an input for transformer layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Deep(nn.Module):
    """A model with nn.Sequential at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Dropout(0.1)), nn.Identity()])
        inner = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Identity(), nn.Linear(16, 12))
        self.tail = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.LayerNorm(16), inner, nn.Linear(12, 3), nn.ELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body[0](x))


def sequences() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 32),)
