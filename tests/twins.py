"""Fused models beside their plain twins: for tests of tools that act on whole models."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from mlp_fused import FusedLinear, FusedMLP, fuse
from mlp_fused.kernels.activations import ACTIVATIONS

KINDS = ("mlp", "linear", "fused")
BACKENDS = ("auto", "triton")
WIDTHS = (4, 8, 3)


def fused_and_twin(kind: str, backend: Any = "auto", activation: str = "relu") -> tuple[nn.Module, nn.Module]:
    """A network of this kind, 4 → 8 → 3, and an nn.Sequential with the same parameters and names of children."""
    width_in, hidden, width_out = WIDTHS
    module = ACTIVATIONS[activation].module
    assert module is not None
    if kind == "linear":
        layers = FusedLinear(width_in, hidden, activation=activation, backend=backend), nn.Linear(hidden, width_out)
        first = nn.Sequential()
        first.add_module("linear", copy.deepcopy(layers[0].linear))
        first.add_module("activation", module())
        return nn.Sequential(*layers), nn.Sequential(first, copy.deepcopy(layers[1]))
    if kind == "mlp":
        model: nn.Module = FusedMLP(width_in, [hidden, width_out], activation_layer=activation, backend=backend)
        return model, nn.Sequential(*copy.deepcopy(list(model.children())))
    twin = nn.Sequential(nn.Linear(width_in, hidden), module(), nn.Linear(hidden, width_out))
    model = copy.deepcopy(twin)
    assert fuse(model, backend=backend).replaced
    return model, twin
