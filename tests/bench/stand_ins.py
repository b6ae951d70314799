"""Made-up rows, small cells, and a simulated host and device, for the tests of the benches."""

from __future__ import annotations

import os
from typing import Any

from bench.problem import GRID, Cell, Problem
from bench.rows import (
    Comparison,
    Copied,
    CopyRow,
    Floor,
    GemmErrors,
    GemmRow,
    Kernel,
    NetworkPhase,
    NetworkRow,
    Throughput,
    Verified,
    Way,
)
from mlp_fused import timing
from mlp_fused.timing import Ceilings, Link, Timing

SMALL = Problem((5, 7, 3), 4)
CELLS = [Cell("odd", SMALL, phase) for phase in ("forward", "backward", "training", "step")]
ANCHOR_CELLS = [cell for cell in GRID if cell.anchor]
VERIFIED = Verified(1e-7, None, (2e-5, 5e-3))


def environment() -> dict[str, str]:
    """The environment of a child process that is neither in Triton's interpreter nor a worker of pytest-xdist."""
    names = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID")
    return {name: value for name, value in os.environ.items() if name not in names}


def make_cell(name: str, problem: Problem = SMALL) -> Cell:
    """A cell for a name of a family and phase, such as "seed-step"."""
    family, phase = name.split("-")
    return Cell(family, problem, phase)


def timed(ms: float, kernel_ms: float | None = None) -> Timing:
    return Timing(ms, ms if kernel_ms is None else kernel_ms, (ms, ms), rounds=5, calls=1)


def floor(kernel_ms: float, ratio: float = 2.0) -> Floor:
    seconds = 1e-3 * kernel_ms / ratio
    return Floor(10**9, 10**6, 1.0, 100.0, seconds, "compute", ratio, Ceilings(1e12, 1e12))


def network_phase(
    ms: float = 1.0, kernel_ms: float = 0.9, path: str = "layer", precision: str = "ieee", ratio: float = 2.0
) -> NetworkPhase:
    our_time = timed(ms, kernel_ms)
    return NetworkPhase(path, "it fits", precision, 1, VERIFIED, 0.5, timing=our_time, floor=floor(kernel_ms, ratio))


def comparison(speedup: float, ms: float = 1.0) -> Comparison:
    return Comparison(timed(speedup * ms), speedup, speedup)


def network_row(
    cell: Cell, eager: float = 1.5, *, device: str = "cuda", baselines: Any = None, **values: Any
) -> NetworkRow:
    """The row of a network with one baseline, eager, unless others are given."""
    ours = {name: values.pop(name) for name in ("ms", "kernel_ms", "path", "precision", "ratio") if name in values}
    if baselines is None:
        baselines = {"eager": comparison(eager)}
    phase = network_phase(**ours)
    return NetworkRow.for_cell(
        cell, device, ours=phase, baselines=baselines, repeat_ms=1.01 * phase.timing.ms, **values
    )


def gemm_row(
    cell: Cell,
    matmul: float = 1.0,
    *,
    precision: str = "ieee",
    kernel_ms: float = 0.9,
    ratio: float = 2.0,
    **values: Any,
) -> GemmRow:
    our_time = timed(1.1 * kernel_ms, kernel_ms)
    ours = Kernel("64x64x32, 4 warps", precision, 1, VERIFIED, timing=our_time, floor=floor(kernel_ms, ratio))
    baselines = values.pop("baselines", {"matmul": comparison(matmul), "eager": comparison(1.3)})
    return GemmRow.for_cell(cell, "cuda", ours=ours, baselines=baselines, repeat_ms=1.01 * our_time.ms, **values)


def errors(
    ours: tuple[float, float] = (1e-7, 1e-6), eager: tuple[float, float] = (1e-7, 1e-6)
) -> dict[str, GemmErrors]:
    return {"ours": GemmErrors(*ours), "eager": GemmErrors(*eager)}


def copy_row(
    cell: Cell,
    copied: dict[str, Copied],
    ways: dict[str, float],
    kernel_ms: dict[str, float],
    over_fastest: float = 1.02,
) -> CopyRow:
    """The row of a copy with the given milliseconds of each way, and of the kernels of each phase."""
    rows, copy_ms, compute_ms = cell.problem.rows, copied["pinned_side_stream"].ms, ways["resident"]
    bound = max(copy_ms, compute_ms)
    read = {
        name: Way(ms, ms, ms, 1e3 * rows / ms, None if name == "resident" else bound / ms) for name, ms in ways.items()
    }
    loop = Throughput(read, copy_ms, compute_ms, bound, None, "prefetched", over_fastest)
    phases = {phase: network_phase(ms, ms) for phase, ms in kernel_ms.items()}
    return CopyRow.for_cell(cell, "cuda", copies=copied, link=Link(50e9, 50e9), throughput=loop, phases=phases)


class HostClock(timing.Clock):
    """The clock of the host, for calls on a CPU that poses as a GPU."""

    def synchronize(self) -> None:
        """Do nothing, because a call on the CPU is complete when it returns."""

    def event(self) -> float:
        return self.now()

    def elapsed_ms(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def spin(self, seconds: float) -> None:
        """Do nothing, because no device runs behind the host."""


class HostAndDevice(timing.Clock):
    """A simulated host that issues, device that computes and link that copies, with times in seconds."""

    def __init__(self) -> None:
        self.host = self.device = self.link = 0.0

    def copy(self, seconds: float, *, waits: bool = False, aside: bool = False) -> None:
        """Copy in the computing stream, or `aside` in another. The host takes 5 µs, and with `waits` waits for it."""
        self.host += 5e-6
        begun = max(self.host, self.link, 0.0 if aside else self.device)
        self.link = begun + seconds
        if not aside:
            self.device = self.link
        if waits:
            self.synchronize()

    def compute(self, seconds: float, issue: float = 2e-4) -> None:
        self.host += issue
        self.device = max(self.device, self.host) + seconds

    def now(self) -> float:
        return self.host

    def synchronize(self) -> None:
        self.host = max(self.host, self.device, self.link)

    def event(self) -> float:
        return max(self.host, self.device)

    def elapsed_ms(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def spin(self, seconds: float) -> None:
        self.compute(seconds, 1e-6)
