"""Measure the Python overhead of a call, without kernels, and compare it with eager PyTorch on layers of width 1.

`pytest bench -k call --benchmark --benchmark-json FILE` writes the numbers to FILE. To compare two commits, run both on
the same machine, several times in alternation, and compare `us` and `ratio`. A difference smaller than their spread
means nothing. The `extra_info` of a row has these microseconds of CPU time per call:

    us, us_spread              ours: the median of 40 rounds, and their interquartile range
    eager_us, eager_us_spread  the same for an nn.Sequential of nn.Linear and activations, in the same rounds
    ratio, ratio_spread        eager's time / ours in each round, so that the speed of the machine cancels out
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlp_fused.engine import autograd, paths
from mlp_fused.engine.layer_path import layer_path
from mlp_fused.engine.row_kernels import stamped
from mlp_fused.engine.table_files import Gemm, Network, Table
from mlp_fused.kernels import devices
from mlp_fused.kernels.language import TRITON_VERSION
from mlp_fused.kernels.launch import Launch, launched_by
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.module import FusedLinear, FusedMLP

Call = Callable[[Tensor], Any]


def microseconds(call: Call, x: Tensor, calls: int) -> float:
    """Return the mean CPU time of a call in microseconds. Unlike wall-clock time, it excludes other processes."""
    start = time.thread_time()
    for _ in range(calls):
        call(x)
    return (time.thread_time() - start) / calls * 1e6


def measure(benchmark: Any, **systems: tuple[Call, Tensor]) -> int:
    """Time the systems in turn, round by round, and store the numbers listed above in `extra_info`.

    Args:
        systems: (function, input) by name: `ours`, `eager`, and others.

    Returns:
        The number of calls of `ours`.
    """
    rounds, calls = (2, 1) if benchmark.disabled else (40, 100)
    readings: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, (call, x) in systems.items():
            readings[name].append(microseconds(call, x, calls))
    figures = {"us" if name == "ours" else f"{name}_us": values for name, values in readings.items()}
    figures["ratio"] = [eager / ours for ours, eager in zip(readings["ours"], readings["eager"])]
    for name, values in figures.items():
        low, benchmark.extra_info[name], high = statistics.quantiles(values, n=4, method="inclusive")
        benchmark.extra_info[f"{name}_spread"] = high - low
    return rounds * calls


def tabulate(benchmark: Any, call: Call, x: Tensor) -> None:
    """Run a few rounds for pytest-benchmark's own table, which shows wall-clock times."""
    benchmark.pedantic(call, (x,), rounds=10, iterations=100)


def test_call_on_the_cpu(benchmark: Any) -> None:
    """784→512→512→10, one row, with modules whose forward does nothing, against nn.Sequential of the same modules."""
    model = FusedMLP(784, [512, 512, 10])
    sequential = nn.Sequential(*(child for child in model if not isinstance(child, nn.Dropout)))
    x = torch.randn(1, 784)
    assert torch.equal(model(x), sequential(x))
    for child in sequential:  # the model has the same modules; without products, only the overhead of calls remains
        child.forward = lambda x: x
    assert model(x) is sequential(x) is x
    measure(benchmark, ours=(model, x), eager=(sequential, x))
    tabulate(benchmark, model, x)


def test_call_of_a_fused_linear_on_the_cpu(benchmark: Any) -> None:
    """64→64 with relu, one row, against nn.Sequential of the same two modules, including the products."""
    layer = FusedLinear(64, 64, activation="relu")
    sequential = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    x = torch.randn(1, 64)
    measure(benchmark, ours=(layer, x), eager=(sequential, x))
    tabulate(benchmark, layer, x)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


class Nothing:
    """A stand-in for a compiled kernel that only counts its launches."""

    def __init__(self) -> None:
        self.launches = 0

    function = packed_metadata = None
    metadata = types.SimpleNamespace(global_scratch_size=1)  # scratch for descriptors, as most kernels have on an H200

    def run(self, *arguments: Any) -> None:
        self.launches += 1


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nothing]:
    """Run the kernels' paths on CPU tensors with the tiles of an H200, and launch this stand-in as every kernel.

    The C library is set to keep freed memory, as PyTorch's CUDA allocator does. Otherwise every call would map and
    unmap a gradient of a megabyte, which takes longer than a launch.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    stand_in = Nothing()
    caches = (layer_path, paths.network_path)
    for cache in caches:
        cache.cache_clear()

    def compile_to_nothing(launch: Launch, tensors: Any) -> None:
        stand_in.launches += 1
        launch.cache_compiled(stand_in, len(tensors))

    monkeypatch.setattr(paths, "why_device", lambda device, backend: None)
    with launched_by(compile_to_nothing), devices.pretended(devices.DEVICES["NVIDIA H200"]):
        yield stand_in
    for cache in caches:
        cache.cache_clear()


@dataclass(frozen=True)
class Case:
    """A module on kernels, and the size of the eager network to compare it with.

    Attributes:
        make: a function that makes the module.
        widths: the widths of input and output.
        layers, activations: the number of layers and activations.
        launches: the number of launches in a forward, and in a forward and backward.
        table: the measured table of the device; by default it has none.
        by_layer: True if each layer is an autograd.Function of its own, as in a wide network.
    """

    make: Callable[[], nn.Module]
    widths: tuple[int, int]
    layers: int
    activations: int
    launches: tuple[int, int]
    table: Table | None = None
    by_layer: bool = False

    def one_wide(self) -> nn.Sequential:
        """Make an eager network with the same number of layers, of width 1, so that products take almost no time."""
        children = [child for _ in range(self.layers) for child in (nn.Linear(1, 1), nn.ReLU())]
        return nn.Sequential(*children[: self.layers + self.activations])


ROWS = 64
KERNEL = TileConfig(16, 16, 16, split=2)  # weight gradients have a second kernel, which adds partial sums


def table(activation: str, **tiles: TileConfig | None) -> Table:
    """A table of the device that gives the products of layers 1→1 these tiles, or torch, by kind.

    `forward` is the tile of the layers with the activation, and `dgrad` that of the layers above them. The forward of
    the last layer is torch's.
    """
    names = {"forward": (activation, "identity"), "dgrad": (activation,), "wgrad": ("identity",)}
    gemms = [
        stamped(Gemm(kind, ROWS, 1, 1, "float32", "ieee", name, tile if name == activation else last, 1.0, 1.0))
        for kind, tile in tiles.items()
        for name, last in zip(names[kind], (tile, None))
    ]
    networks = [
        stamped(Network((1,) * 5, ROWS, "float32", "ieee", activation, training, "layer", {"layer": 1.0}))
        for training in (False, True)
    ]
    versions = {"triton": ".".join(map(str, TRITON_VERSION))}
    return Table("NVIDIA H200", "2026-01-01", versions, tuple(gemms), tuple(networks))


class Least(torch.autograd.Function):
    """A call without modules, checks and caches: it allocates the output and the gradients, and launches the kernels.

    x, W, b … -> y. `outputs` has y's shape.
    """

    @staticmethod
    def forward(ctx: Any, case: Case, kernel: Nothing, outputs: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        y = torch.empty_like(outputs)
        Least.launch(kernel, case.launches[0], x, *parameters, y)
        ctx.save_for_backward(x)
        ctx.kernel, ctx.launches, ctx.parameters = kernel, case.launches[1] - case.launches[0], parameters
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [*map(torch.empty_like, ctx.parameters)]
        Least.launch(ctx.kernel, ctx.launches, dy, *ctx.saved_tensors, *ctx.parameters, *gradients)
        return None, None, None, None, *gradients

    @staticmethod
    def launch(kernel: Nothing, launches: int, *tensors: Tensor) -> None:
        pointers = [*map(Tensor.data_ptr, tensors)]
        for _ in range(launches):
            kernel.run(*pointers)


def one_wide(activation: type[nn.Module]) -> nn.Module:
    return FusedMLP(1, [1, 1, 1, 1], activation_layer=activation, backend="triton")


# relu: the products that an H100's table leaves to torch in 512→512→512→512→512. gelu: those in 1024→…→1024.
WITH_TORCH = {
    "relu": (nn.ReLU, table("relu", forward=None, dgrad=KERNEL, wgrad=KERNEL), (3, 14)),
    "gelu": (nn.GELU, table("gelu", forward=KERNEL, dgrad=None, wgrad=KERNEL), (3, 14)),
    "all": (nn.GELU, table("gelu", forward=None, dgrad=None, wgrad=None), (3, 6)),
}
CASES = {
    "layer": Case(lambda: FusedLinear(64, 64, activation="relu", backend="triton"), (64, 64), 1, 1, (1, 4)),
    "network": Case(lambda: FusedMLP(64, [64, 64, 64, 64], backend="triton"), (64, 64), 4, 3, (1, 4)),
    "wide": Case(lambda: FusedMLP(784, [512, 512, 10], backend="triton"), (784, 10), 3, 2, (3, 8)),
} | {
    f"torch-{name}{'-by-layer' * by_layer}": Case(partial(one_wide, kind), (1, 1), 4, 3, launches, measured, by_layer)
    for name, (kind, measured, launches) in WITH_TORCH.items()
    for by_layer in (False, True)
}
PHASES = ("inference", "training-forward", "training-backward")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_call(benchmark: Any, nothing: Nothing, monkeypatch: pytest.MonkeyPatch, name: str, phase: str) -> None:
    """Python and autograd overhead of a call with 64 rows in fp32. Launches do nothing.

    The modules are a FusedLinear 64→64 with relu (layer), a FusedMLP 64→64→64→64→64 on the network path (network) and a
    FusedMLP 784→512→512→10 on the layer path (wide). The modules torch-* have four layers on the layer path, and torch
    computes some of their products; they are one wide, so that these products take almost no time. The phases are a
    forward under no_grad (inference), a forward with gradients enabled (training-forward), and this forward with its
    backward (training-backward). Eager is an nn.Sequential with the same number of layers, of width 1, for one row.
    `least_us` is the time of `Least`, one autograd.Function with as many launches and parameters, without any checks.
    """
    case = CASES[name]
    if case.table is not None:  # the backend "auto" takes no kernels on a CPU
        monkeypatch.setattr(paths, "leaves_to_torch", lambda backend: True)
    if case.by_layer:
        monkeypatch.setattr(autograd, "LAUNCH_BOUND", -1)
    model, eager = case.make(), case.one_wide()
    width_in, width_out = case.widths
    x, scalar = torch.randn(ROWS, width_in), torch.randn(1, 1)

    def in_phase(call: Call, module: nn.Module, dy: Tensor) -> Call:
        parameters = tuple(module.parameters())
        return (lambda x: torch.autograd.grad(call(x), parameters, dy)) if phase == "training-backward" else call

    parameters = tuple(model.parameters())
    least: Any = Least
    outputs, other = torch.randn(ROWS, width_out), Nothing()
    ours = in_phase(model, model, outputs)
    systems = {
        "ours": (ours, x),
        "eager": (in_phase(eager, eager, scalar), scalar),
        "least": (in_phase(lambda x: least.apply(case, other, outputs, x, *parameters), model, outputs), x),
    }
    decided = contextlib.nullcontext() if case.table is None else paths.decided_by(case.table)
    with torch.set_grad_enabled(phase != "inference"), decided:
        ours(x)
        launches = nothing.launches
        assert launches == case.launches[phase == "training-backward"]
        benchmark.extra_info["id"] = f"call-{name}-{phase}"
        calls = measure(benchmark, **systems)
        assert nothing.launches == launches * (1 + calls)
        tabulate(benchmark, ours, x)
