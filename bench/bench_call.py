"""The Python of a call on the CPU: FusedMLP beside the nn.Sequential that it replaces, their children doing nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fused import FusedMLP


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
