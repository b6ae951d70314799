"""The Python of a call, without what it computes: FusedMLP beside the nn.Sequential that it replaces."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlp_fused import FusedLinear, FusedMLP
from mlp_fused.engine import paths
from mlp_fused.engine.layer_path import layer_path
from mlp_fused.kernels import network_tiles
from mlp_fused.kernels.launch import Launch


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
    rounds, calls = (1, 1) if benchmark.disabled else (50, 200)
    differences = []
    for _ in range(rounds):
        baseline = microseconds(sequential, x, calls)
        differences.append(microseconds(model, x, calls) - baseline)
    benchmark.extra_info["slower_by_us"] = statistics.median(differences)
    benchmark.extra_info["sequential_us"] = baseline
    benchmark.pedantic(model, (x,), rounds=rounds, iterations=calls)


def test_call_of_a_fused_linear_on_the_cpu(benchmark: Any) -> None:
    """64→64 with relu, one row: `extra_info["us"]`, beside nn.Sequential of the same two modules in the same rounds."""
    layer = FusedLinear(64, 64, activation="relu")
    sequential = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    x = torch.randn(1, 64)
    rounds, calls = (1, 1) if benchmark.disabled else (50, 200)
    readings = [(microseconds(layer, x, calls), microseconds(sequential, x, calls)) for _ in range(rounds)]
    benchmark.extra_info["us"], benchmark.extra_info["sequential_us"] = map(statistics.median, zip(*readings))
    benchmark.extra_info["of_sequential"] = statistics.median(ours / theirs for ours, theirs in readings)
    benchmark.pedantic(layer, (x,), rounds=rounds, iterations=calls)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


class Nothing:
    """In place of a compiled kernel: counts its launches."""

    def __init__(self) -> None:
        self.launches = 0

    function = packed_metadata = None
    metadata = types.SimpleNamespace(global_scratch_size=1)  # for descriptors, as most have on an H200

    def run(self, *arguments: Any) -> None:
        self.launches += 1


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nothing]:
    """Calls take the kernels' paths on CPU tensors, with an H200's tiles, and launch a compiled kernel: this one.

    The C library keeps what memory is given back to it, as torch's allocator for GPUs does; else a gradient of a
    megabyte is mapped and unmapped in each call, which takes longer than a launch.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    instead = Nothing()
    remembered = (layer_path, paths.network_path)
    for cache in remembered:
        cache.cache_clear()

    def compile_to_nothing(launch: Launch, tensors: Any) -> None:
        instead.launches += 1
        launch.keep(instead, len(tensors))

    monkeypatch.setattr(Launch, "through_triton", compile_to_nothing)
    monkeypatch.setattr(paths, "why_device", lambda device, backend: None)
    monkeypatch.setattr(network_tiles, "describe", lambda kind, index=0: network_tiles.DEVICES["NVIDIA H200"])
    yield instead
    for cache in remembered:
        cache.cache_clear()


class Empty(torch.autograd.Function):
    """The least that autograd asks of a network with as many parameters: nothing computed, gradients allocated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return dy, *map(torch.empty_like, ctx.parameters)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_call_of_a_narrow_network(benchmark: Any, nothing: Nothing, training: bool) -> None:
    """64→64→64→64→64 up to the launch, which does nothing; a launch comes on top.

    `extra_info["us"]` and, in the same rounds, that of an empty `Function.apply` with the same tensors and of
    nn.Sequential calling children that do nothing: medians of each, and of the ratio to twice their sum.
    """
    model = FusedMLP(64, [64, 64, 64, 64], backend="triton")
    linears = [child for child in model if isinstance(child, nn.Linear)]
    parameters = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
    sequential = nn.Sequential(*(nn.Identity() for child in model if not isinstance(child, nn.Dropout)))
    x = torch.randn(64, 64)
    rounds, calls = (1, 1) if benchmark.disabled else (50, 200)
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
        assert nothing.launches == 1 + rounds * calls
        names = ("us", "empty_apply_us", "sequential_us")
        benchmark.extra_info.update({name: statistics.median(each) for name, each in zip(names, zip(*readings))})
        ratios = [ours / (2 * (apply + dispatch)) for ours, apply, dispatch in readings]
        benchmark.extra_info["of_twice_both"] = statistics.median(ratios)
        benchmark.pedantic(model, (x,), rounds=rounds, iterations=calls)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_call_of_a_fused_linear(benchmark: Any, nothing: Nothing, training: bool) -> None:
    """64→64 with relu, 64 rows, up to the launch, which does nothing.

    `extra_info["us"]` and, in the same rounds, nn.Sequential of the same two modules one wide, for one row.
    """
    layer = FusedLinear(64, 64, activation="relu", backend="triton")
    sequential = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    x, one = torch.randn(64, 64), torch.randn(1, 1)
    rounds, calls = (1, 1) if benchmark.disabled else (50, 200)
    with torch.set_grad_enabled(training):
        assert layer(x).requires_grad == training
        readings = [(microseconds(layer, x, calls), microseconds(sequential, one, calls)) for _ in range(rounds)]
        assert nothing.launches == 1 + rounds * calls
        benchmark.extra_info["us"], benchmark.extra_info["sequential_us"] = map(statistics.median, zip(*readings))
        benchmark.extra_info["of_sequential"] = statistics.median(ours / theirs for ours, theirs in readings)
        benchmark.pedantic(layer, (x,), rounds=rounds, iterations=calls)


@pytest.mark.parametrize("what", ["inference-forward", "training-forward", "training-backward"])
def test_call_of_the_layer_path(benchmark: Any, nothing: Nothing, what: str) -> None:
    """784→512→512→10, fp32, batch 64, up to the launches, which do nothing; "backward" is forward and backward.

    At most 40 µs for a forward and 120 µs for forward and backward is the goal: `extra_info["us"]`, the median. In the
    same rounds, nn.Sequential of the same modules one wide, for one row: torch's own calls, with next to no product in
    them; and one autograd.Function that computes nothing, with as many parameters: what torch alone takes of any.
    """
    model = FusedMLP(784, [512, 512, 10], backend="triton")
    sequential = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))

    def call_of(module: nn.Module, dy: Tensor) -> Callable[[Tensor], Any]:
        parameters = list(module.parameters())
        if what != "training-backward":
            return module
        return lambda x: torch.autograd.grad(module(x), parameters, dy)

    ours, theirs = call_of(model, torch.randn(64, 10)), call_of(sequential, torch.randn(1, 1))
    x, one = torch.randn(64, 784), torch.randn(1, 1)
    parameters = tuple(model.parameters())

    def empty(x: Tensor) -> Any:
        if what == "inference-forward":
            return None
        y = Empty.apply(x, *parameters)
        return torch.autograd.grad(y, parameters, x) if what == "training-backward" else y

    rounds, calls = (1, 1) if benchmark.disabled else (50, 100)
    readings: list[tuple[float, float, float]] = []
    with torch.set_grad_enabled(what != "inference-forward"):
        ours(x)
        launches = nothing.launches
        assert launches >= 3
        for _ in range(rounds):
            own, other = microseconds(ours, x, calls), microseconds(theirs, one, calls)
            readings.append((own, other, microseconds(empty, x, calls)))
        assert nothing.launches == launches * (1 + rounds * calls)
        benchmark.extra_info["id"] = f"call-layer-{what}"
        names = ("us", "sequential_us", "empty_us")
        benchmark.extra_info.update({name: statistics.median(each) for name, each in zip(names, zip(*readings))})
        benchmark.extra_info["of_sequential"] = statistics.median(own / other for own, other, _ in readings)
        benchmark.pedantic(ours, (x,), rounds=rounds, iterations=calls)
