"""The Python of a call, without what it computes: FusedMLP beside the nn.Sequential that it replaces."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlp_fused import FusedMLP, plan
from mlp_fused.kernels import network


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    """A call's mean time."""
    start = time.perf_counter()
    for _ in range(calls):
        call(x)
    return (time.perf_counter() - start) / calls * 1e6


def test_call_on_the_cpu(benchmark: Any) -> None:
    """784→512→512→10: `extra_info["slower_by_us"]` is the median of paired differences: both see one machine."""
    model = FusedMLP(784, [512, 512, 10])
    sequential = nn.Sequential(*(child for child in model if not isinstance(child, nn.Dropout)))
    x = torch.randn(1, 784)
    assert torch.equal(model(x), sequential(x))
    for child in sequential:  # the same modules as the model's: products and their noise go, calls stay
        child.forward = lambda x: x
    assert model(x) is sequential(x) is x
    rounds, calls = (1, 1) if benchmark.disabled else (100, 200)
    differences = []
    for _ in range(rounds):
        baseline = microseconds(sequential, x, calls)
        differences.append(microseconds(model, x, calls) - baseline)
    benchmark.extra_info["slower_by_us"] = statistics.median(differences)
    benchmark.extra_info["sequential_us"] = baseline
    benchmark.pedantic(model, (x,), rounds=rounds, iterations=calls)


class Nothing:
    """In place of a kernel: takes a launch, and counts it."""

    __name__ = "nothing"

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Nothing:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.launches += 1


class Empty(torch.autograd.Function):
    """The least that autograd asks of a network with as many parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, *(None for _ in ctx.needs_input_grad[1:])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_call_of_a_narrow_network(benchmark: Any, monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """64→64→64→64→64 up to Triton's launch, its kernel replaced by nothing; Triton's own launcher comes on top.

    `extra_info["us"]` and, in the same rounds, that of an empty `Function.apply` with the same tensors and of
    nn.Sequential calling children that do nothing: medians of each, and of the ratio to twice their sum.
    """
    kernel = Nothing()
    monkeypatch.setattr(network, "network_forward_kernel", kernel)
    monkeypatch.setattr(plan, "_why_device", lambda device, backend: None)
    model = FusedMLP(64, [64, 64, 64, 64], backend="triton")
    linears = [child for child in model if isinstance(child, nn.Linear)]
    parameters = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
    sequential = nn.Sequential(*(nn.Identity() for child in model if not isinstance(child, nn.Dropout)))
    x = torch.randn(64, 64)
    rounds, calls = (1, 1) if benchmark.disabled else (100, 200)
    readings: list[tuple[float, float, float]] = []
    with torch.set_grad_enabled(training):
        assert model(x).requires_grad == training
        for _ in range(rounds):
            readings.append(
                (
                    microseconds(model, x, calls),
                    microseconds(lambda x: Empty.apply(x, *parameters), x, calls),
                    microseconds(sequential, x, calls),
                )
            )
        assert kernel.launches == 1 + rounds * calls
        names = ("us", "empty_apply_us", "sequential_us")
        benchmark.extra_info.update({name: statistics.median(each) for name, each in zip(names, zip(*readings))})
        ratios = [ours / (2 * (apply + dispatch)) for ours, apply, dispatch in readings]
        benchmark.extra_info["of_twice_both"] = statistics.median(ratios)
        benchmark.pedantic(model, (x,), rounds=rounds, iterations=calls)
