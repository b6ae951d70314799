"""Models, their plain twins, and ways to replace code, for tests of code that is not torch's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlp_fused import FusedLinear, FusedMLP
from mlp_fused.kernels.launch import count_launches

BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton"])


def runs_kernels(backend: str, device: str) -> bool:
    """True if a network without changed code launches kernels: "auto" does so on a GPU."""
    return backend == "triton" or device == "cuda"


def network(device: str, backend: str, activation: Any = "gelu") -> FusedMLP:
    return FusedMLP(8, [8, 4], activation_layer=activation, backend=backend, device=device)


class Functional(nn.Module):
    """The modules of a FusedLinear, called one after another."""

    def __init__(self, layer: FusedLinear) -> None:
        super().__init__()
        self.linear, self.activation = layer.linear, layer.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


def layer(device: str, backend: str, activation: Any = "gelu") -> FusedLinear:
    return FusedLinear(8, 16, activation=activation, backend=backend, device=device)


def twin(model: nn.Module) -> nn.Module:
    """The same modules, with the same parameters, in plain torch."""
    if isinstance(model, FusedLinear):
        return Functional(model)
    return nn.Sequential(*(Functional(child) if isinstance(child, FusedLinear) else child for child in model))


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def assert_agrees(model: Any, x: Tensor, kernels: bool | None) -> None:
    """Assert that the results are the twin's, and that kernels ran (True), none ran (False), or either (None)."""
    expected = results(twin(model), x)
    with count_launches() as launches:
        actual = results(model, x)
    assert kernels is None or bool(launches) == kernels
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def double(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords) * 2

    return double


class Missing:
    """Stands for an attribute that does not exist."""


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, Missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is Missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
