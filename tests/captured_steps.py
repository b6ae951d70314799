"""Steps, batches and optimizers for tests of captured steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mlp_fused import FusedMLP

Step = Callable[[Tensor, Tensor], Tensor]


def network(device: str = "cpu", backend: str = "auto") -> FusedMLP:
    """A network with BatchNorm and Dropout, whose statistics and random numbers a step changes too."""
    torch.manual_seed(1)
    return FusedMLP(12, [16, 8, 5], nn.BatchNorm1d, nn.GELU, dropout=0.3, backend=backend, device=device)


def batches(count: int, device: str = "cpu", rows: int = 9) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        x = torch.randn(rows, 12, generator=generator)
        yield x.to(device), torch.randint(5, (rows,), generator=generator).to(device)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of everything that training changes."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "random": torch.get_rng_state(),
        "random of the device": torch.cuda.get_rng_state() if next(model.parameters()).is_cuda else None,
    }
    return copy.deepcopy(state)


def assert_equal(actual: Any, expected: Any, where: str = "") -> None:
    """Assert that two nested dicts and lists are equal to the last bit."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_equal(actual[index], value, f"{where}[{index}]")
    else:
        assert actual == expected, where


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 2**-4),
    # The first step differs from later ones: the momentum buffer begins as the gradient.
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, 2**-4, momentum=0.9, dampening=0.5),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, 2**-4, momentum=0.9, nesterov=True, fused=True),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, 2**-7, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, 2**-7, amsgrad=True, fused=True),
}
