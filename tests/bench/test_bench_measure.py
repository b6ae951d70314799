"""What the benches are built of, without a GPU: arithmetic, clocks on a simulated device, the grid, resuming."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench import bench_call, conftest, fresh, gemm, goals, gpu, measure, report
from bench.conftest import problems_of
from bench.machine import ROOT, machine, user_table_digest
from bench.problem import ANCHORS, FAMILIES, GEMM_PHASES, GRID, PHASES, Cell, Problem, cases, select
from mlp_fused import FusedMLP, graphs, timing
from mlp_fused.environment import DISTORTING, distorted
from mlp_fused.plan import Work, work
from mlp_fused.timing import Ceilings, Timed

SMALL = Problem((5, 7, 3), 4)
CELLS = [Cell("odd", SMALL, phase) for phase in ("forward", "backward", "training", "step")]


# The grid


def test_ids_are_unique_and_name_every_field() -> None:
    assert len({str(cell) for cell in GRID}) == len(GRID)
    assert str(GRID[0]) == "seed-784x512x512x10-relu-fp32-m256-step"
    assert "odd-256x512x256-gelu-bf16-m16384-sliced-forward" in map(str, GRID)


def test_each_family_has_an_anchor_and_anchors_come_first_in_the_families_order() -> None:
    assert [str(cell) for cell in GRID if cell.anchor] == [str(cell) for cell in GRID[: len(ANCHORS)]] == list(ANCHORS)
    assert list(dict.fromkeys(cell.family for cell in GRID[: len(ANCHORS)])) == list(FAMILIES)
    rest = [cell.family for cell in GRID[len(ANCHORS) :]]
    assert rest == sorted(rest, key=FAMILIES.index)


def test_phases_of_a_problem_stand_side_by_side() -> None:
    rest = [(cell.family, cell.problem) for cell in GRID[len(ANCHORS) :]]
    changes = sum(a != b for a, b in pairwise(rest))
    assert changes + 1 == len(set(rest))


def test_every_cell_has_a_known_phase_and_family() -> None:
    assert {cell.phase for cell in GRID} == set(PHASES)
    assert {cell.family for cell in GRID} == set(FAMILIES)


def test_the_copy_family_has_every_input_of_the_grid_in_32_and_16_bits() -> None:
    def inputs(cells: list[Cell]) -> set[tuple[object, ...]]:
        return {(cell.problem.widths[0], cell.problem.rows, cell.problem.layout) for cell in cells}

    copied = [cell for cell in GRID if cell.phase == "copy"]
    assert inputs(copied) == inputs([cell for cell in GRID if cell.family in report.NETWORKS])
    assert Counter(cell.problem.dtype for cell in copied) == {"fp32": len(copied) // 2, "bf16": len(copied) // 2}


def test_gemms_are_the_products_of_the_networks_each_once() -> None:
    of_one_network = {f"{cell.problem}-{cell.phase}" for cell in select("gemm-*-bf16-m8192-*")}
    assert of_one_network == {
        f"{layer}-bf16-m8192-{phase}"
        for k, n in ((4096, 16384), (1024, 4096))
        for layer, phase in (
            (f"{k}x{n}-gelu", "layer_forward"),
            (f"{k}x{n}-gelu", "layer_forward_z"),
            (f"{k}x{n}-identity", "wgrad"),
            (f"{n}x{k}-identity", "layer_forward"),
            (f"{n}x{k}-gelu", "dgrad"),
            (f"{n}x{k}-identity", "wgrad"),
        )
    }
    for family in ("seed", "middle", "large"):
        for network in {cell.problem for cell in GRID if cell.family == family}:
            for k, n in pairwise(network.widths):
                (_,) = select(f"gemm-{k}x{n}-*-{network.dtype}-m{network.rows}-wgrad")


def test_select() -> None:
    assert select() == list(GRID)
    assert {cell.phase for cell in select("narrow-*-forward")} == {"forward"}
    with pytest.raises(ValueError, match="no cell of the grid matches 'nothing'"):
        select("nothing")


def test_copies_are_for_a_gpu_only() -> None:
    assert {(cell.phase, device) for cell, device in cases("copy")} == {
        ("copy", "cuda"),
        ("first_touch", "cuda"),
        ("lecture", "cpu"),
        ("lecture", "cuda"),
    }


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(pattern: str, device: str) -> str | None:
        return measure.why_not(select(pattern)[0], device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason("seed-*-m64-step", "cpu") is None
    assert reason("narrow-128x128x128x128x128-relu-fp32-m1048576-forward", "cpu") == (
        "more than 10 GFLOP in fp32: not on a CPU"
    )
    assert reason("middle-256*-m4096-forward", "cpu") == "more than 0.1 GFLOP in 16 bits: not on a CPU"
    assert reason("narrow-16x*-fp32-m2097152-forward", "cpu") == "moves more than 0.15 GB: not on a CPU"
    assert "`python -m bench.fresh lecture --cpu --rows 10000` runs it" in str(reason("*-lecture", "cpu"))
    assert "no CUDA device" in str(reason("seed-*", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason("large-*-m32768-step", "cuda") is None
    assert reason("*-lecture", "cpu") == "the row on the GPU has the product on the CPU beside it"


# Arithmetic


def test_work_of_phases() -> None:
    problem = Problem((784, 512, 10), 64, cross_entropy=True)
    layers = work(64, (784, 512, 10), torch.float32, "relu")
    assert measure.work_of(problem, "forward", "cpu") == layers["inference"]
    assert measure.work_of(problem, "forward", "cpu").flops == 2 * 64 * (784 * 512 + 512 * 10)
    assert measure.work_of(problem, "training", "cpu") == layers["forward"] + layers["backward"]
    parameters = 784 * 512 + 512 + 512 * 10 + 10
    extra = 4 * (7 * parameters + 2 * 64 * 10)
    assert measure.work_of(problem, "step", "cpu") == measure.work_of(problem, "training", "cpu") + Work(0, extra)
    assert measure.work_of(Problem((10, 10), 10), "lecture", "cpu") == Work(2000, 1200)


def test_against_floor() -> None:
    found = measure.against_floor(Work(flops=2_000_000, bytes=500_000), Ceilings(1e12, 1e12), ms=0.004)
    assert found["floor_s"] == pytest.approx(2e-6)
    assert (found["bound"], found["floor_ratio"]) == ("compute", pytest.approx(2.0))
    assert (found["tflops"], found["gbps"]) == (pytest.approx(0.5), pytest.approx(125.0))
    assert measure.against_floor(Work(1, 500_000), Ceilings(1e12, 1e12), ms=1.0)["bound"] == "memory"


def test_graphs_are_captured_and_replayed_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Graph:
        made = 0

        def __init__(self) -> None:
            self.number = Graph.made
            Graph.made += 1

        def replay(self) -> None:
            log.append(f"replay {self.number}")

    @contextlib.contextmanager
    def capture(graph: Graph, pool: object, stream: object) -> Iterator[None]:
        log.append(f"capture {graph.number}")
        yield

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

    def call(i: int) -> int:
        log.append(f"call {i}")
        return i

    found = measure.graphed(Timed(call, lambda i: log.append(f"setup {i}"), sets=100))
    assert log[:2] == ["setup 0", "call 0"]  # warm-up
    assert log[6:10] == ["capture 0", "setup 0", "capture 1", "call 0"]
    assert found.sets == measure.GRAPHED_SETS
    log.clear()
    found.prepare(9)
    assert found(9) == found.sets - 1  # only the last capture's outputs are kept
    assert log == ["replay 2", "replay 3"]


# Rows on a CPU


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_row_is_complete_and_plain(cell: Cell) -> None:
    reported: list[dict[str, Any]] = []
    row = json.loads(json.dumps(measure.measure(cell, "cpu", reported.append)))
    assert row["id"] == str(cell)
    assert row["path"] == "reference"
    assert row["ms"] > 0
    assert row["repeat_ms"] > 0
    assert row["floor_ratio"] == pytest.approx(1e-3 * row["kernel_ms"] / row["floor_s"])
    assert row["baselines"]["eager"]["speedup"] == pytest.approx(row["baselines"]["eager"]["ms"] / row["ms"])
    assert row["copy"] is None
    assert len(reported) == 1
    assert "ms, " in gpu.summary(row)


# Kernels by themselves


def torch_forward(x: Any, weight: Any, bias: Any, h: Any, z: Any, activation: Any, *_: Any) -> None:
    product = torch.addmm(bias, x, weight.t())
    h.copy_(gemm.FORWARDS[activation.name](product))
    if z is not None:
        z.copy_(product)


def torch_dgrad(dz: Any, weight: Any, saved: Any, dx: Any, h: Any, below: Any, *_: Any) -> None:
    dx.copy_(gemm.BACKWARDS[below.name](dz @ weight, saved))
    if h is not None:
        h.copy_(gemm.FORWARDS[below.name](saved))


def torch_wgrad(dz: Any, h: Any, dw: Any, db: Any, *_: Any) -> None:
    dw.copy_(dz.t() @ h)
    db.copy_(dz.sum(0))


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("layer_forward", torch_forward), ("dgrad", torch_dgrad), ("wgrad", torch_wgrad)):
        monkeypatch.setattr(gemm, name, function)
    gemm.gemm_for.cache_clear()


def gemm_cell(phase: str, dtype: Any = "fp32", activation: str = "gelu") -> Cell:
    return Cell("gemm", Problem((40, 24), 33, dtype, "identity" if phase == "wgrad" else activation), phase)


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize(
    ("phase", "dtype"), [("layer_forward", "bf16"), ("layer_forward_z", "fp32"), ("dgrad", "fp32"), ("wgrad", "bf16")]
)
def test_a_gemm_row_is_complete_and_plain(phase: str, dtype: str) -> None:
    reported: list[dict[str, Any]] = []
    row = json.loads(json.dumps(measure.measure(gemm_cell(phase, dtype), "cpu", reported.append)))
    assert row["flops"] == 2 * 33 * 40 * 24
    assert list(row["baselines"]) == ["matmul", "eager"]
    matmul = row["baselines"]["matmul"]
    assert matmul["kernel_speedup"] == pytest.approx(matmul["kernel_ms"] / row["kernel_ms"])
    assert row["floor_ratio"] == pytest.approx(1e-3 * row["kernel_ms"] / row["floor_s"])
    assert "warps" in row["tile"]
    assert row["tile"] in gpu.summary(row)
    assert len(reported) == 2
    assert ("errors" in row) == (dtype == "fp32")
    for errors in row.get("errors", {}).values():
        assert 1e-9 < errors["norm"] < 1e-6
        assert 1e-9 < errors["entry"] < 1e-6


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("phase", GEMM_PHASES)
def test_a_wrong_or_missing_entry_of_a_kernel_is_found(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "layer_forward" if phase.startswith("layer_forward") else phase
    monkeypatch.setattr(gemm, kernel, lambda *arguments: None)
    with pytest.raises(AssertionError, match="wrong against eager"):
        measure.prepare(gemm_cell(phase), "cpu")


def test_the_bare_product_is_the_one_inside_the_kernel() -> None:
    for phase in GEMM_PHASES:
        found = gemm.Gemm(gemm_cell(phase, activation="relu").problem, phase, "cpu")
        product = found.matmul(0)
        if phase == "dgrad":
            product = gemm.BACKWARDS["relu"](product, found.operands[0].saved)  # type: ignore[arg-type]
        elif phase != "wgrad":
            product = torch.relu(product.add(found.operands[0].bias))  # type: ignore[arg-type]
        torch.testing.assert_close(product, found.eager(0)[0])


def test_kernels_run_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    cells = [gemm_cell("layer_forward_z"), gemm_cell("dgrad"), gemm_cell("wgrad")]
    cells += [gemm_cell("layer_forward", "bf16", "relu"), gemm_cell("dgrad", "bf16", "relu")]
    script = "from bench import measure\nfrom bench.problem import Cell, Problem\n"
    script += f"for cell in {cells}: measure.prepare(cell, 'cpu')\n"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


# What else a row says


def test_memory_of_a_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module's forward is given so much memory, and its backward as much again."""
    bench = measure.Bench(SMALL, "cpu")
    state = {"now": 100, "peak": 0}

    def allocate(size: int) -> None:
        state["now"] += size
        state["peak"] = max(state["peak"], state["now"])

    def counted(module: nn.Module, size: int) -> None:
        forward = module.forward

        def run(x: torch.Tensor) -> torch.Tensor:
            allocate(size)
            y = forward(x)
            y.register_hook(lambda dy: allocate(size))
            return y

        module.forward = run

    counted(bench.model, 3)
    counted(bench.eager, 4)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: state.update(peak=state["now"]))
    assert measure.memory(bench) == {
        "ours": {"kept_bytes": 3, "peak_bytes": 6},
        "eager": {"kept_bytes": 4, "peak_bytes": 8},
        "kept_ratio": 0.75,
        "peak_ratio": 0.75,
    }


class HostAndDevice(timing.Clock):
    """A host that issues, a device that computes and a link that copies, in seconds, in the place of the real ones."""

    def __init__(self) -> None:
        self.host = self.device = self.link = 0.0

    def copy(self, seconds: float, *, waits: bool = False, aside: bool = False) -> None:
        """In the stream that computes, or `aside`; the host issues it in 5 µs, and with `waits` waits for it."""
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


@pytest.mark.parametrize(("copy", "work"), [(1e-3, 2e-3), (2e-3, 1e-3), (5e-6, 5e-6)], ids=["work", "copy", "launches"])
def test_throughput_of_each_way_against_the_slower_of_copy_and_compute(copy: float, work: float) -> None:
    clock = HostAndDevice()

    def to_device(_: int) -> None:
        clock.copy(5 * copy, waits=True)
        clock.compute(work)

    def non_blocking(_: int) -> None:
        clock.copy(copy)
        clock.compute(work)

    def prefetched(_: int) -> None:
        clock.device = max(clock.device, clock.link)
        clock.copy(copy, aside=True)
        clock.compute(work)

    simulated = {"to_device": to_device, "non_blocking": non_blocking, "prefetched": prefetched}
    calls = {name: Timed(call) for name, call in simulated.items()} | {"resident": Timed(lambda _: clock.compute(work))}
    found = measure.throughput(calls, rows=1000, copy_ms=1e3 * copy, clock=clock)
    assert found["cpu_ms"] is None
    assert found["over_fastest"] <= 1.05 + 1e-9
    assert found["advised"] == ("prefetched" if work > 2e-4 else found["advised"])
    ways = found["ways"]
    assert found["compute_ms"] == ways["resident"]["ms"] == pytest.approx(1e3 * max(work, 2e-4), rel=0.05)
    assert found["bound_ms"] == max(found["copy_ms"], found["compute_ms"])
    for name, way in ways.items():
        assert way["examples_per_s"] == pytest.approx(1e6 / way["ms"])
        assert name == "resident" or way["of_bound"] == pytest.approx(found["bound_ms"] / way["ms"])
    if work > 2e-4:  # else all but the launches is hidden anyway
        assert ways["to_device"]["ms"] == pytest.approx(1e3 * (5 * copy + work), rel=0.15)
        assert ways["non_blocking"]["ms"] == pytest.approx(1e3 * (copy + work), rel=0.15)
    assert ways["prefetched"]["of_bound"] > 0.9
    assert "of_bound" not in ways["resident"]


# What the model of the copy rows' time takes for granted; bytes/s, FLOP/s, seconds.
LINK, PAGEABLE = 40e9, 8e9
FRESH = 2e9  # into the host's memory that is touched for the first time; pinned memory is used again
MEMORY, FLOPS = 2e12, {"fp32": 50e12, "bf16": 500e12}  # of kernels, and of eager, which verifies them
ROW = 0.25  # building the model, collecting garbage, pytest's own
KERNELS, KERNEL, CORES = 199, 1.3, 14  # those of the copy rows on an H100, compiled by so many processes
PROCESS = 8  # a process that imports torch, makes a context and compiles one network's kernels
CPU_FLOPS = 0.5e12
STARTING = 8  # pytest, torch and its compiler imported, the ceilings and the link measured


def seconds_of_a_copy_row(problem: Problem) -> float:
    """Of a simulated host, device and link, by the code that measures."""
    clock = HostAndDevice()
    nbytes = problem.rows * problem.widths[0] * (4 if problem.dtype == "fp32" else 2)

    def work(phase: str) -> float:
        return measure.work_of(problem, phase, "cpu").floor(FLOPS[problem.dtype], MEMORY)

    def with_copy(seconds: float, **how: bool) -> Timed:
        def call(_: int) -> None:
            clock.copy(seconds, **how)
            clock.compute(work("training"))

        return Timed(call)

    def copy_alone(seconds: float, waits: bool) -> Timed:
        return Timed(lambda _: clock.copy(seconds, waits=waits), waits=waits)

    def compute(phase: str) -> Callable[[int], None]:
        return lambda _: clock.compute(work(phase))

    clock.host += ROW + nbytes / FRESH + 2 * nbytes / PAGEABLE  # to the host, and twice into pinned memory
    # Verified: three phases and the resident way, and eager's.
    for phase in (*2 * ["forward"], *6 * ["training"]):
        clock.compute(work(phase))
    for rate, waits in ((PAGEABLE, True), (LINK, True), (LINK, False)):
        timing.time_apart(copy_alone(nbytes / rate, waits), measure.COPY_SECONDS, clock)
    ways = {
        "to_device": with_copy(nbytes / PAGEABLE, waits=True),
        "non_blocking": with_copy(nbytes / LINK),
        "prefetched": with_copy(nbytes / LINK, aside=True),
        "resident": Timed(compute("training")),
    }
    flops = measure.work_of(problem, "training", "cpu").flops
    cpu = None
    if flops <= measure.COPIED_CPU_FLOPS and problem.dtype == "fp32":

        def on_the_cpu(_: int) -> None:
            clock.host += flops / CPU_FLOPS + 3e-4

        cpu = Timed(on_the_cpu)
    measure.throughput(ways, problem.rows, 1e3 * nbytes / LINK, cpu, clock)
    for timed in (
        Timed(compute("forward")),
        Timed(compute("backward"), setup=compute("forward")),
        Timed(compute("step")),
    ):
        timing.time_cuda(timed, measure.COPY_SECONDS, clock)
    clock.synchronize()
    return clock.now() + max(measure.COPY_SECONDS, 3 * nbytes / LINK)  # and what pytest-benchmark shows


def test_the_copy_rows_take_less_than_three_minutes_of_a_gpu() -> None:
    cells = [cell for cell, device in cases("copy") if device == "cuda"]
    rows = sum(seconds_of_a_copy_row(cell.problem) for cell in cells if cell.phase == "copy")
    (lecture,) = (cell.problem for cell in cells if cell.phase == "lecture")
    on_the_cpu = 2 * 2 * lecture.rows**3 / CPU_FLOPS
    compiling = PROCESS + KERNELS * KERNEL / CORES
    assert compiling < measure.COMPILE_SECONDS
    processes = 3 * PROCESS  # of the lecture, and of the first touch with Triton's cache empty and filled
    assert 30 < rows < 120
    assert STARTING + rows + compiling + processes + on_the_cpu < 180


def seconds_of_a_cpu_row(cell: Cell) -> float:
    """Simulate a row on a host of two cores, through the code that measures."""
    clock = HostAndDevice()
    work = measure.work_of(cell.problem, cell.phase, "cpu")
    rate = 40e9 if cell.problem.dtype == "fp32" else 2e9

    def call(_: int) -> None:
        clock.host += work.flops / rate + work.bytes / 4e9 + 1e-4

    for _ in range(6):  # verified against eager: ours, eager, and ours again for pytest-benchmark
        call(0)
    for _ in range(3):  # ours, eager, and the repetition
        timing.time_cpu(Timed(call), measure.CPU_SECONDS, clock)
    for _ in range(3):
        call(0)
    return clock.now() + measure.CPU_SECONDS + ROW


def test_the_rows_of_a_cpu_take_less_than_a_minute_of_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cells = [cell for cell in GRID if "cpu" in cell.devices and measure.why_not(cell, "cpu") is None]
    assert {cell.family for cell in cells} == {"seed", "narrow", "odd"}
    assert {cell.problem.dtype for cell in cells} == {"fp32", "fp16", "bf16"}
    assert {cell.phase for cell in cells} == {"forward", "backward", "training", "step"}
    assert 10 < sum(map(seconds_of_a_cpu_row, cells)) < 60


def test_kernels_of_copy_rows_are_compiled_ahead_the_smallest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []

    class Compilers(contextlib.nullcontext[Any]):
        def __init__(self, compile: object, gpu: object, target: object, workers: int) -> None:
            super().__init__(self)
            assert (compile, gpu, target) == (measure._compile, "gpu", "target")

        def ask(self, work: dict[Problem, Problem]) -> None:
            asked.extend(work)

        def wait(self, key: Problem, seconds: float) -> None:
            assert key in asked
            assert 0 < seconds <= measure.COMPILE_SECONDS
            raise measure.NotYetError

    monkeypatch.setattr(measure, "Compilers", Compilers)
    monkeypatch.setattr(measure.configs, "describe", lambda kind: "gpu")
    active = SimpleNamespace(get_current_target=lambda: "target")
    monkeypatch.setattr(measure, "driver", SimpleNamespace(active=active))
    problems = [Problem((5, 3), rows) for rows in (8, 2, 4)]
    measure.compile_ahead(problems)
    assert [problem.rows for problem in asked] == [2, 4, 8]


def test_the_kernels_of_copy_rows_are_compiled_ahead() -> None:
    def item(**params: Any) -> Any:
        return SimpleNamespace(callspec=SimpleNamespace(params=params))

    rows = [item(cell=cell) for cell in GRID]
    problems = problems_of([SimpleNamespace(), item(phase="copy"), *rows, *rows])  # type: ignore[list-item]
    assert problems == [cell.problem for cell in GRID if cell.phase == "copy"]


def test_what_a_call_launches_is_compiled() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    script = """
from bench import measure
from bench.problem import Problem
from mlp_fused.compiling import compile_only
from mlp_fused.kernels.configs import DEVICES
from mlp_fused.kernels.launch import Launch

compile_only(DEVICES["NVIDIA H100"], None)
Launch.through_triton = lambda launch, tensors: print(launch.kernel.__name__)
for problem in (Problem((64, 64, 64), 2**20, "bf16"), Problem((784, 512, 10), 64)):
    measure._compile(problem)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["MLP_FUSED_BACKEND"] = "triton"  # no product is left to torch
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    launched = child.stdout.split()
    assert launched.count("network_forward_kernel") >= 1
    assert launched.count("layer_forward_kernel") == 2 * 2  # in inference, in training
    assert launched.count("dgrad_kernel") == 1
    assert launched.count("wgrad_kernel") == 2


def test_the_ways_of_the_data_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    bench = measure.Bench(SMALL, "cpu")
    found = measure.ways(bench)
    assert list(found) == ["to_device", "non_blocking", "prefetched", "resident"]
    for name, timed in found.items():
        assert len(timed(0)) == len(bench.parameters)
        assert (timed.drain is not None) == (name == "prefetched")
    monkeypatch.setattr(measure, "DevicePrefetcher", lambda batches, device: (2 * x for x in batches))
    with pytest.raises(AssertionError, match="prefetched brings another batch"):
        measure.ways(bench)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    bench.model.register_forward_hook(lambda model, x, y: 2 * y)
    with pytest.raises(AssertionError, match="wrong against eager"):
        measure.ways(bench)


@pytest.mark.parametrize(("cpu", "advised"), [(1e-4, "cpu"), (2e-3, "to_device")])
def test_the_advised_way_is_judged_by_a_reading_of_its_own(cpu: float, advised: str) -> None:
    """The ways are as fast as each other at first, later all but the simplest are twice as fast: it was bad advice."""
    clock = HostAndDevice()
    calls = Counter[str]()

    def timed(name: str) -> Timed:
        def call(_: int) -> None:
            calls[name] += 1
            late = calls["resident"] > 0 and name != "to_device"
            clock.compute(5e-4 if late else 1e-3)

        return Timed(call)

    def on_the_cpu(_: int) -> None:
        clock.host += cpu

    ways = {name: timed(name) for name in measure.WAYS}
    found = measure.throughput(ways, 1000, 1.0, Timed(on_the_cpu), clock)
    assert found["advised"] == advised
    assert found["cpu_ms"] == pytest.approx(1e3 * cpu)
    assert found["over_fastest"] == pytest.approx(1 if advised == "cpu" else 2, rel=0.05)


@pytest.mark.parametrize(
    ("problem", "is_read"), [(SMALL, True), (replace(SMALL, dtype="bf16"), False), (replace(SMALL, rows=10**7), False)]
)
def test_the_cpu_stands_beside_small_steps_in_fp32(problem: Problem, is_read: bool) -> None:
    bench = measure.Bench(problem, "cpu") if is_read else measure.Bench(problem, "meta")
    timed = measure.on_the_cpu(bench)
    assert (timed is not None) == is_read
    if timed is not None:
        expected = torch.autograd.grad(bench.eager(bench.host), bench.parameters, bench.gradients[0])
        assert all(map(torch.equal, timed(0), expected))


def test_warmup_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(FusedMLP, "warmup", lambda self, batch_size: asked.append(batch_size), raising=False)
    found = fresh.warmup(SMALL, "cpu")
    assert asked == [SMALL.rows]
    assert list(found) == ["warmup", "training", "training_2"]


def test_a_step_moves_the_parameters_and_verifying_puts_them_back() -> None:
    bench = measure.Bench(SMALL, "cpu")
    before = [p.detach().clone() for p in bench.parameters]
    timed = bench.timed(bench.model, "step")
    bench.verify(timed, "step")
    assert all(torch.equal(p, q) for p, q in zip(bench.parameters, before, strict=True))
    timed(0)
    assert not any(torch.equal(p, q) for p, q in zip(bench.parameters, before, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "problem",
    [Problem((16,) * 5, 256), Problem((2, 2), 2**20)],
    ids=["gradients of zero", "gradients over a million rows"],
)
def test_many_steps_leave_parameters_and_optimizer_state_finite(problem: Problem, dtype: Any) -> None:
    bench = measure.Bench(replace(problem, dtype=dtype), "cpu")
    optimizer = bench.optimizer()
    step = bench.step(bench.model, optimizer)
    for _ in range(100):
        step(0)
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert len(state) == 3 * len(bench.parameters)  # a count of steps and two moments each
    for tensor in (*bench.parameters, *state):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("phase", ["forward", "backward", "training", "step"])
def test_a_wrong_function_is_not_timed(phase: str) -> None:
    bench = measure.Bench(SMALL, "cpu")
    wrong = nn.Sequential(bench.eager[0], nn.Tanh(), bench.eager[2])
    with pytest.raises(AssertionError, match="wrong against eager"):
        bench.verify(bench.timed(wrong, phase), phase)


def test_a_baseline_that_fails_is_a_text() -> None:
    def build(bench: measure.Bench, phase: str) -> Timed:
        raise torch.OutOfMemoryError("CUDA out of memory.\n\nTried to allocate 2 GiB")

    bench = measure.Bench(SMALL, "cpu")
    row = measure._measure_baseline(bench, measure.Baseline("large", build), "forward", {"ms": 1.0, "kernel_ms": 1.0})
    assert row == {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}


@pytest.mark.parametrize(
    ("ms", "gbps", "of_link", "from_1_ms"), [(2.0, 45.0, 0.9, 0.8), (1.0, 45.0, None, 0.8), (0.1, 45.0, None, None)]
)
def test_figures_of_a_copy_row(ms: float, gbps: float, of_link: float | None, from_1_ms: float | None) -> None:
    row = {
        "copy": {"pinned_side_stream": {"ms": ms, "gbps": gbps, "host_ms": 0.01}},
        "link": {"to_device": 50e9, "to_host": 50e9},
        "throughput": {"ways": {"prefetched": {"ms": ms, "of_bound": 0.8}}, "over_fastest": 1.02},
    }
    assert goals.of_link(row) == (of_link and pytest.approx(of_link))
    assert goals.of_the_slower(row) == 0.8
    assert goals.of_the_slower_from_a_millisecond(row) == from_1_ms
    assert goals.over_the_fastest(row) == 1.02
    figures = (goals.of_link, goals.of_the_slower, goals.of_the_slower_from_a_millisecond, goals.over_the_fastest)
    assert [figure({}) for figure in figures] == [None] * 4


def test_the_prefetcher_is_judged_by_the_seed_at_1024_rows_and_by_narrow_networks_at_a_million() -> None:
    (goal,) = (each for each in goals.GOALS if "of seed at 1024 rows" in each.text)
    concerned = [str(cell) for cell in GRID if goal.concerns({"id": str(cell)})]
    assert "copy-784x512x512x10-relu-fp32-m1024-copy" in concerned
    assert sum("m1048576" in name for name in concerned) == 8  # four widths in 32 and 16 bits
    assert len(concerned) == 10


def test_baselines_of_a_cell() -> None:
    def names(pattern: str, device: str = "cuda") -> list[str]:
        (cell,) = select(pattern)
        return [baseline.name for baseline in measure.BASELINES if baseline.applies(cell, device)]

    common = ["eager", "cuda_graph", "compile"]
    steps = ["eager", "cuda_graph", "captured", "captured_eager", "compile"]
    assert names(ANCHORS[0]) == [*steps, "compile_max_autotune"]
    assert names("seed-*-m64-step") == steps
    assert names("middle-256*-relu-*-m4096-forward") == ["eager", "addmm_activation", "cuda_graph", "compile"]
    assert names("middle-256*-relu-*-m4096-backward") == common
    assert names("seed-*-m64-step", "cpu") == ["eager"]


@pytest.mark.parametrize("name", ["captured", "captured_eager"])
def test_a_captured_step_is_verified_as_any_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that runs the step anew, and into the same memory, where a GPU would replay it."""

    class Graph:
        def __init__(self, device: torch.device) -> None:
            pass

        def warm_up(self, function: Callable[[], Any]) -> None:
            function()

        def capture(self, function: Callable[[], Any]) -> Any:
            self.function, self.results = function, function()
            return self.results

        def replay(self) -> None:
            for memory, value in zip(self.results, self.function(), strict=True):
                memory.copy_(value)

    monkeypatch.setattr(graphs, "_CudaGraph", Graph)
    monkeypatch.setattr(graphs, "_check_device", lambda optimizer, x: None)
    (baseline,) = [each for each in measure.BASELINES if each.name == name]
    bench = measure.Bench(replace(SMALL, cross_entropy=True), "cpu")
    timed = baseline.build(bench, "step")
    assert bench.verify(timed, "step")["verified"]["gradients"] is not None
    model = bench.model if name == "captured" else bench.eager
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_addmm_activation_computes_the_model() -> None:
    bench = measure.Bench(SMALL, "cpu")
    bench.verify(bench.timed(measure.addmm_activation(bench), "forward"), "forward")


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(layout: str) -> None:
    (x,) = measure.Bench(Problem((5, 3), 4, layout=layout), "cpu").inputs
    assert x.shape == (4, 5)
    assert x.stride() == ((1, 4) if layout == "transposed" else (10, 1))
    assert not x.is_contiguous()


def test_machine_names_what_a_number_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(gpu.SAME) <= set(machine())


@pytest.mark.parametrize("switch", DISTORTING)
def test_nothing_is_measured_under_a_switch_that_distorts(
    switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in DISTORTING:
        monkeypatch.delenv(name, raising=False)
    assert distorted() is None
    monkeypatch.setenv(switch, "1")
    refused = f"{switch} is set, which .*: unset it to measure"
    assert re.match(f"{refused}$", str(distorted()))
    monkeypatch.setattr(gpu, "why_not", lambda *_: None)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert re.search(refused, capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["fresh", "warmup"])
    with pytest.raises(SystemExit):
        fresh.main()
    assert re.search(refused, capsys.readouterr().err)
    command = [sys.executable, "-m", "pytest", "-q", "bench/bench_grid.py", "--benchmark", "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4  # pytest's own, for a mistake in the command
    assert re.search(refused, done.stderr)


@pytest.mark.parametrize("told", [{"dist": "load"}, {"dist": "no", "worker": True}], ids=["with -n", "in a worker"])
def test_rows_are_not_measured_side_by_side(told: dict[str, Any]) -> None:
    option = SimpleNamespace(benchmark=True, benchmark_enable=False, benchmark_only=False)
    config: Any = SimpleNamespace(option=option, getoption=lambda name, default: told.get(name, default))
    if "worker" in told:
        config.workerinput = {}
    with pytest.raises(pytest.UsageError, match="--benchmark goes without -n"):
        conftest.pytest_configure(config)


def test_a_users_own_table_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_table_digest("NVIDIA H200") is None
    path = tmp_path / "mlp_fused" / "nvidia_h200.json"
    path.parent.mkdir()
    digests = set()
    for text in ("{}", "{} "):
        path.write_text(text)
        digests.add(user_table_digest("NVIDIA H200"))
    assert None not in digests
    assert len(digests) == 2
    assert user_table_digest("NVIDIA H100") is None


def test_lecture_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "bench.fresh", "lecture", "--cpu", "--rows", "32"]
    assert set(measure._json_of(command)) == {"cpu_product", "cpu_product_2"}
    with pytest.raises(RuntimeError, match="ended with status 2"):
        measure._json_of([*command, "--rows", "many"])


def test_the_flag_measures_and_writes_what_the_row_says(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_grid.py", "bench/bench_compiled.py", __file__, "-q"]
    command += ["--benchmark", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    command += ["-k", "seed and m64-forward or test_compiled or test_select"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout
    assert "test_select" not in child.stdout  # the tools are tested without the flag
    content = json.loads(path.read_text())
    assert content["machine_info"]["torch"] == torch.__version__
    report.markdown(report.read(path), {}, "slug")  # raises where the report cannot read it
    row = next(b["extra_info"] for b in content["benchmarks"] if b["extra_info"]["device"] == "cpu")
    assert row["flops"] == 2 * 64 * (784 * 512 + 512 * 512 + 512 * 10)
    if not torch.cuda.is_available():
        assert "rows skipped: no CUDA device" in child.stdout
        assert "1 rows skipped: no CUDA device: `python tests/compile_kernels.py --networks`" in child.stdout
        assert f"not measured  ≥ 1.3    {goals.GOALS[7].text}" in child.stdout


# Goals


def made_up(name: str, eager: float = 1.5, **fields: Any) -> dict[str, Any]:
    return {"id": name, "device": "cuda", "path": "layer", "baselines": {"eager": {"speedup": eager}}, **fields}


def verdict(goal: goals.Goal, *rows: dict[str, Any]) -> str:
    return goal.judge(rows).split("  ")[0]


def test_every_goal_has_rows_in_the_grid() -> None:
    calls = [{"id": f"call-{name}-{phase}"} for name in bench_call.CASES for phase in bench_call.PHASES]
    rows = [{"id": str(cell), "device": device} for cell in GRID for device in cell.devices] + calls
    for goal in goals.GOALS:
        assert any(goal.concerns(row) for row in rows), goal.text
        assert verdict(goal, *rows) == "not measured"
    products = {tuple(cell.problem.widths) for cell in GRID if goals.GOALS[0].concerns({"id": str(cell)})}
    assert products == {(4096, 16384), (16384, 4096), (1024, 4096), (4096, 1024)}
    # Each that is set beside max-autotune has an anchor, which alone is measured so.
    compiled = [goal for goal in goals.GOALS if goals.COMPILED in goal.text]
    assert len(compiled) == 3
    assert all(any(goal.concerns({"id": name}) for name in ANCHORS) for goal in compiled)


def test_a_goal_is_judged_by_its_worst_row() -> None:
    goal = next(goal for goal in goals.GOALS if "seed" in goal.text)
    good, bad = made_up("seed-a-step", 1.4), made_up("seed-b-step", 1.2)
    assert verdict(goal, good) == "met"
    assert goal.judge([good, bad]).startswith("missed        ≥ 1.3    1.200")
    assert goal.judge([good, bad]).endswith("seed-b-step, the worst of 2")
    assert verdict(goal, bad | {"device": "cpu"}) == "not measured"
    broken = {"id": "seed-c-step", "error": "out of memory"}
    assert goal.judge([good, broken]).endswith("seed-a-step, 1 failed")
    assert verdict(goal, {"id": "seed-c-step", "baselines": {"eager": {"error": "no"}}}) == "not measured"


def test_figures_of_goals() -> None:
    assert goals.of_bare_product({"baselines": {"matmul": {"kernel_speedup": 0.8}}}) == pytest.approx(1.25)
    errors = {"ours": {"norm": 1.0, "entry": 3.0}, "eager": {"norm": 2.0, "entry": 2.0}}
    assert goals.of_eagers_error({"errors": errors, "precision": "ieee"}) == pytest.approx(1.5)
    assert goals.of_eagers_error({"errors": errors, "precision": "tf32"}) is None
    assert goals.over_eager_in_full_fp32(made_up("large", precision="tf32")) is None
    assert goals.over_eager_in_full_fp32(made_up("large", precision="ieee")) == 1.5
    assert goals.kept_ratio({"memory": {"kept_ratio": 0.5}}) == 0.5


def test_the_share_of_rows_on_our_kernels() -> None:
    rows = [
        made_up("narrow-a-step", path="network"),
        made_up("narrow-b-step"),
        made_up("odd-a-forward", path="reference"),
        {"id": "odd-b-forward", "error": "wrong", "path": "layer"},
        made_up("seed-a-step", path="reference") | {"device": "cpu"},
        {"id": "gemm-a-dgrad", "device": "cuda", "tile": "64x64"},
    ]
    assert goals.report(rows)[:2] == [
        "narrow: 2 of 2 rows run on our kernels",
        "odd: 0 of 2 rows run on our kernels, 1 failed",
    ]
    assert len(goals.report(rows)) == 2 + len(goals.GOALS)


# gpu.py

MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "source": "abc"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Simulated:
    """A worker whose rows take as long as they are told to, or raise; compiling and the ceilings take `ahead` each."""

    def __init__(
        self, clock: Clock, outcomes: dict[int, float | Exception], usual: float = 2.0, ahead: float = 5.0
    ) -> None:
        self.clock, self.outcomes, self.usual, self.ahead = clock, outcomes, usual, ahead
        self.asked = list[tuple[Cell, float]]()
        self.compiled = list[list[Problem]]()

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        outcome = self.outcomes.get(len(self.asked), self.usual)
        self.asked.append((cell, seconds))
        if isinstance(outcome, Exception):
            raise outcome
        self.take(outcome, seconds)
        return {"id": str(cell), "seconds": {"context": 1.0}}

    def take(self, needed: float, seconds: float) -> None:
        self.clock.now += min(needed, seconds)
        if needed > seconds:
            raise gpu.CutOffError(f"stopped after {seconds:.0f} s", {"path": "layer"})

    def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
        self.compiled.append(problems)
        self.take(self.ahead, seconds)

    def ceilings(self, seconds: float) -> dict[str, Any]:
        self.take(self.ahead, seconds)
        return {}


def results_in(directory: Path, **changes: Any) -> gpu.Results:
    return gpu.Results(directory, MACHINE | changes, "nvidia_h200")


def run(results: gpu.Results, outcomes: dict[int, float | Exception], limit: float = 1e9) -> tuple[int, list[str]]:
    clock, said = Clock(), list[str]()
    plan = gpu.Plan(results, Path(), Simulated(clock, outcomes), limit, clock=clock, say=said.append)
    return plan.run_rows(results.todo(CELLS)), said


def test_rows_are_written_one_by_one_and_not_run_again(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    done, said = run(results, {1: 15.0}, limit=20.0)
    assert (done, len(said)) == (2, 2)
    assert list(json.loads((tmp_path / "nvidia_h200.json").read_text())["rows"]) == [str(cell) for cell in CELLS[:2]]
    again = results_in(tmp_path)
    assert again.note is None
    assert again.todo(CELLS) == CELLS[2:]
    assert run(again, {})[0] == 2
    assert results_in(tmp_path).todo(CELLS) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_row_is_recorded_and_the_rest_run(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    done, said = run(results, {0: gpu.RowError("AssertionError: wrong", {"path": "layer"})})
    assert done == 4
    failed = results.rows[str(CELLS[0])]
    assert (failed["error"], failed["path"]) == ("AssertionError: wrong", "layer")
    assert "failed: AssertionError: wrong" in said[0]
    assert results_in(tmp_path).todo(CELLS) == []
    assert results_in(tmp_path).todo(CELLS, retry=True) == CELLS[:1]


def test_a_row_past_its_own_limit_is_an_error_but_not_one_cut_off_by_the_end(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    done, said = run(results, {0: 1e6, 1: 1e6}, limit=gpu.ROW_SECONDS + 50.0)
    assert done == 2
    assert results.rows[str(CELLS[0])]["error"] == f"stopped after {gpu.ROW_SECONDS:.0f} s"
    assert "unfinished" not in results.rows[str(CELLS[0])]
    assert "unfinished: stopped after 50 s" in said[-1]
    cut_off = results_in(tmp_path).rows[str(CELLS[1])]
    assert (cut_off["unfinished"], cut_off["path"]) == (50.0, "layer")  # and what was measured of it
    assert results_in(tmp_path).todo(CELLS) == CELLS[1:]


def test_an_unfinished_row_is_measured_again_only_with_more_time(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    run(results, {0: 1e6}, limit=30.0)
    before = dict(results.rows)
    assert list(before) == [str(CELLS[0])]
    assert run(results, {}, limit=20.0)[0] == 3  # the others
    assert results.rows[str(CELLS[0])] == before[str(CELLS[0])]
    assert run(results, {}, limit=40.0)[0] == 1
    assert results.todo(CELLS) == []


ANCHOR_CELLS = [cell for cell in GRID if cell.anchor]


class Commands:
    """Tests and a tuner that take as long as they are told to, or as they are given."""

    def __init__(self, clock: Clock, **needed: float) -> None:
        self.clock, self.needed = clock, needed
        self.ran: list[tuple[str, float]] = []

    def __call__(self, command: list[str], root: Path, log: Path, seconds: float, grace: float) -> dict[str, Any]:
        needed = self.needed[log.stem]
        spent = min(needed, seconds)
        self.clock.now += spent
        self.ran.append((log.stem, seconds))
        finished = needed <= seconds
        return {"finished": finished, "status": 0 if finished else None, "summary": log.stem, "seconds": spent}


FOREVER = 1e9
QUICK = {"tests": 100.0, "tests_alone": 40.0, "tune": 1.0}


def ten_minutes(results: gpu.Results, needed: dict[str, float], **rows: Any) -> tuple[Commands, Simulated, Clock]:
    """Run gpu.py's plan for ten minutes with commands and rows that take so long."""
    clock = Clock()
    commands, worker = Commands(clock, **needed), Simulated(clock, {}, **rows)
    plan = gpu.Plan(results, results.path.parent, worker, 600 - gpu.RESERVE, commands, clock, say=lambda line: None)
    todo = results.todo(GRID)
    plan.tests_and_tuner(sum(cell.anchor for cell in todo), gpu.TESTS_SHARE, gpu.TUNE_SHARE)
    plan.measure(todo)
    assert clock.now <= 600 - gpu.RESERVE
    return commands, worker, clock


@pytest.mark.parametrize("slow", [("tests",), ("tests_alone",), ("tune",), ("tests", "tests_alone", "tune")], ids=str)
def test_the_anchors_have_rows_after_ten_minutes_however_slow_tests_and_tuner_are(
    slow: tuple[str, ...], tmp_path: Path
) -> None:
    results = results_in(tmp_path)
    commands, _, _ = ten_minutes(results, QUICK | dict.fromkeys(slow, FOREVER), usual=24.0)
    given = dict(commands.ran)
    assert given["tests"] == pytest.approx(240, abs=2)
    assert ("tune" in given) == (slow == ("tune",))
    assert [name for name in map(str, ANCHOR_CELLS) if "error" in results.rows.get(name, {"error": "no row"})] == []
    assert results.content["tests"]["finished"] == (slow == ("tune",))


def test_quick_tests_leave_their_time_to_the_tuner_and_to_rows(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    commands, worker, clock = ten_minutes(results, QUICK)
    assert dict(commands.ran)["tune"] == pytest.approx(gpu.TUNE_SHARE * (300 - 140), abs=2)
    assert results.content["tests"] == {"finished": True, "status": 0, "summary": "tests; tests_alone", "seconds": 140}
    assert [cell for cell, _ in worker.asked[: len(ANCHORS)]] == ANCHOR_CELLS
    assert len(worker.asked) > 5 * len(ANCHORS)
    assert clock.now == pytest.approx(600 - gpu.RESERVE, abs=gpu.SHORTEST)
    again, worker, _ = ten_minutes(results, QUICK | {"tune": FOREVER})  # which has nothing to reserve
    ((name, seconds),) = again.ran
    assert (name, seconds) == ("tune", gpu.TUNE_SHARE * (600 - gpu.RESERVE))
    assert not set(ANCHOR_CELLS) & {cell for cell, _ in worker.asked}


def test_kernels_are_compiled_ahead_those_of_the_anchors_first(tmp_path: Path) -> None:
    _, worker, _ = ten_minutes(results_in(tmp_path), QUICK)
    anchors, rest = worker.compiled
    assert anchors == list(dict.fromkeys(cell.problem for cell in ANCHOR_CELLS if cell.phase != "warmup"))
    reached = {cell.problem for cell, _ in worker.asked if not cell.anchor}
    assert rest
    assert len(rest) == len(set(rest))
    assert set(rest) <= reached  # and none that are far from their turn


@pytest.mark.parametrize("ahead", [5.0, FOREVER])
def test_every_anchor_has_its_part_of_the_time_and_what_was_measured_of_it_is_kept(
    ahead: float, tmp_path: Path
) -> None:
    """Also where compiling ahead and the ceilings hang."""
    results = results_in(tmp_path)
    _, worker, _ = ten_minutes(results, dict.fromkeys(QUICK, FOREVER), usual=FOREVER, ahead=ahead)
    parts = [seconds for _, seconds in worker.asked[: len(ANCHORS)]]
    assert min(parts) == pytest.approx(max(parts))
    assert min(parts) > 20
    assert [results.rows[name]["path"] for name in ANCHORS] == ["layer"] * len(ANCHORS)
    assert results.todo(ANCHOR_CELLS) == ANCHOR_CELLS
    _, worker, _ = ten_minutes(results, QUICK, usual=40.0)  # which is more than an anchor's part, and fits
    assert results.todo(ANCHOR_CELLS) == []


def test_no_row_begins_with_too_little_time_left(tmp_path: Path) -> None:
    assert run(results_in(tmp_path), {}, limit=gpu.SHORTEST - 1)[0] == 0


@pytest.mark.parametrize("change", [{"torch": "2.13.0"}, {"source": "def"}, {"driver": "580"}, {"user_table": "0a"}])
def test_another_machine_or_version_starts_a_new_file(tmp_path: Path, change: dict[str, str]) -> None:
    run(results_in(tmp_path), {})
    results = results_in(tmp_path, **change)
    assert f"has another {next(iter(change))}" in str(results.note)
    assert results.todo(CELLS) == CELLS
    (aside,) = tmp_path.glob("nvidia_h200.until-*.json")
    assert len(json.loads(aside.read_text())["rows"]) == 4


def test_a_broken_file_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "nvidia_h200.json").write_text('{"machine": [')
    assert "put aside" in str(results_in(tmp_path).note)


def obedient(cell: Cell, device: str, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Does in the worker what the cell's activation says."""
    report({"path": "layer"})
    if cell.problem.activation == "die":
        os._exit(3)
    if cell.problem.activation == "hang":
        time.sleep(600)
    if cell.problem.activation == "raise":
        raise ValueError("no such thing")
    return {"id": str(cell), "device": device}


def note_problems(problems: list[Problem]) -> None:
    """In the worker, in place of compiling."""
    print("compiled:", *problems, flush=True)


def test_a_worker_survives_what_rows_do(tmp_path: Path) -> None:
    def cell(activation: str) -> Cell:
        return Cell("odd", Problem((1, 1), 1, activation=activation), "forward")

    worker = gpu.Worker(tmp_path / "worker.log", "cpu", obedient, note_problems)
    try:
        assert worker.measure(cell("relu"), 120) == {"id": str(cell("relu")), "device": "cpu"}
        first = worker.process.pid
        worker.compile_ahead([cell("relu").problem], 120)
        assert f"compiled: {cell('relu').problem}" in (tmp_path / "worker.log").read_text()
        with pytest.raises(gpu.RowError, match="ValueError: no such thing") as failure:
            worker.measure(cell("raise"), 120)
        assert failure.value.partial == {"path": "layer"}
        assert worker.process.pid == first
        with pytest.raises(gpu.RowError, match="ended with status 3"):
            worker.measure(cell("die"), 120)
        worker.measure(cell("relu"), 120)
        second = worker.process.pid
        assert second != first
        with pytest.raises(gpu.CutOffError, match="stopped after 1 s") as cut_off:
            worker.measure(cell("hang"), 1)
        assert cut_off.value.partial == {"path": "layer"}
        assert worker.process is None
        with pytest.raises(ProcessLookupError):
            os.kill(second, 0)
    finally:
        worker.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children that take SIGINT, also where this process runs in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("stubborn", "summary"), [(False, "said at the end"), (True, "begun")])
@pytest.mark.usefixtures("interruptible")
def test_a_child_that_runs_out_of_time_can_still_write_and_is_killed_after_its_grace(
    stubborn: bool, summary: str, tmp_path: Path
) -> None:
    (tmp_path / "child.py").write_text(
        "import signal, time\n"
        f"if {stubborn}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('begun', flush=True)\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: print('said at the end')\n"
    )
    outcome = gpu.run_module(["child"], tmp_path, tmp_path / "child.log", seconds=6, grace=2)
    assert (outcome["finished"], outcome["status"], outcome["summary"]) == (False, None, summary)
    assert 4 <= outcome["seconds"] < 20
    assert (outcome["seconds"] >= 6) == stubborn


# Without the fixtures of tests/conftest.py that import torch.
GPU_TESTS = """
import time
import pytest

@pytest.fixture(autouse=True, scope="session")
def _no_tables(): pass

@pytest.fixture(autouse=True)
def _fresh_settings(): pass

@pytest.mark.gpu
def test_wrong(): assert 1 + 1 == 3

@pytest.mark.gpu
@pytest.mark.{mark}
def test_other(): time.sleep({seconds})
"""


@pytest.mark.usefixtures("interruptible")
def test_tests_have_a_share_of_the_time_and_their_failures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "2")
    results = results_in(tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    alone\n    quick\n")
    (tests / "test_some.py").write_text(GPU_TESTS.format(mark="quick", seconds=600))
    gpu.run_tests(results, tmp_path, tmp_path, seconds=gpu.GRACE + 2)
    assert results.content["tests"]["finished"] is False
    assert results.content["tests"]["summary"].endswith("; not begun")
    for log in ("tests.log", "failures.txt"):
        assert "assert (1 + 1) == 3" in (tmp_path / log).read_text()
    (tests / "test_some.py").write_text(GPU_TESTS.format(mark="alone", seconds=0))
    gpu.run_tests(results, tmp_path, tmp_path, seconds=120)
    found = json.loads(results.path.read_text())["tests"]
    assert (found["finished"], found["status"]) == (True, 1)
    assert re.search("1 failed.*; 1 passed", found["summary"])
    assert (tmp_path / "failures.txt").read_text().count("test_wrong (call)") == 1  # of this run alone


TUNER = """
import argparse, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["tune"])
parser.add_argument("--minutes", type=float, required=True)
parser.add_argument("--out", type=pathlib.Path, required=True)
options = parser.parse_args()
again = options.out.exists()
options.out.write_text("{}")
print("carried on" if again else "begun", options.minutes)
"""


def test_the_tuner_has_a_share_of_the_time_and_may_fail(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    (tmp_path / "mlp_fused").mkdir()
    (tmp_path / "mlp_fused" / "__init__.py").touch()  # or one in PYTHONPATH would be run
    script = tmp_path / "mlp_fused" / "__main__.py"

    def tune(source: str, seconds: float = 60) -> dict[str, Any]:
        script.write_text(source)
        gpu.run_tuner(results, tmp_path, tmp_path, seconds)
        return json.loads(results.path.read_text())["tune"]

    refused = tune("import sys; sys.exit('tune: there is no such command')")
    assert (refused["finished"], refused["status"], refused["file"]) == (True, 1, None)
    assert gpu.ending(refused).startswith("tune: there is no such command (")
    found = tune(TUNER)
    assert (found["status"], found["summary"]) == (0, "begun 0.75")  # minutes; the rest is grace
    assert found["file"] == "tuned_nvidia_h200.json"
    assert tune(TUNER)["summary"] == "carried on 0.75"
    slow = tune(TUNER + "time.sleep(600)", seconds=2)
    assert (slow["finished"], slow["status"]) == (False, None)
    assert "cut off" in gpu.ending(slow)


def test_one_command_runs_tests_tuner_and_rows_and_ends_with_the_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    class Worker:
        def __init__(self, log: Path) -> None: ...

        def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
            ran.append(str(cell))
            return made_up(str(cell), 1.25, ms=1.0, floor_ratio=2.0)

        def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
            ran.append("compile")

        def ceilings(self, seconds: float) -> dict[str, Any]:
            ran.append("ceilings")
            return {}

        def close(self) -> None: ...

    def run_module(command: list[str], root: Path, log: Path, seconds: float, grace: float) -> dict[str, Any]:
        ran.append(" ".join(command[:2]))
        return {"finished": True, "status": 2 * (command[0] == "mlp_fused"), "summary": "done", "seconds": 1.0}

    for name, stand_in in (
        ("why_not", lambda *_: None),
        ("distorted", lambda: None),
        ("machine", lambda: MACHINE),
        ("Worker", Worker),
        ("run_module", run_module),
    ):
        monkeypatch.setattr(gpu, name, stand_in)
    steps = [str(cell) for cell in select("seed-*-step")]
    assert gpu.main(["--out", str(tmp_path), "--cells", "seed-*-step"]) == 0  # the tuner's failure is no row's
    assert ran == ["pytest -m", "pytest -m", "mlp_fused tune", "ceilings", "compile", steps[0], "compile", *steps[1:]]
    said = capsys.readouterr().out
    assert "tuner: done (" in said
    assert f"seed: {len(steps)} of {len(steps)} rows run on our kernels" in said
    assert "missed        ≥ 1.3    1.250" in said
    ran.clear()
    assert gpu.main(["--out", str(tmp_path), "--cells", "seed-*-step"]) == 0
    assert ran == ["mlp_fused tune"]
    assert gpu.main(["--out", str(tmp_path), "--cells", "seed-*-step", "--tune-share", "0"]) == 0
    assert ran == ["mlp_fused tune"]


def test_without_a_gpu_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("nothing was measured: no CUDA device")
    assert gpu.main(["--out", str(tmp_path), "--cells", "nothing"]) == 2
    assert not list(tmp_path.iterdir())


# Words that select rows


def words_after_k() -> set[str]:
    """Each `-k WORD` of a bench command in a README or a docstring."""
    files = [
        ROOT / "README.md",
        *(path for folder in ("bench", "kernels", "mlp_fused") for path in (ROOT / folder).rglob("*")),
    ]
    texts = [path.read_text() for path in files if path.suffix in (".md", ".py") and path.is_file()]
    return {word for text in texts for word in re.findall(r"""bench[^`\n]* -k ["']?(\w+)""", text)}


def test_each_word_of_the_readmes_selects_a_row() -> None:
    words = words_after_k()
    assert {"seed", "copy"} <= words
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    names = [line.partition("::")[2].lower() for line in collected.splitlines() if "bench_" in line]
    for word in words | set(FAMILIES) | {"call", "dropout", "compiled", "tinycudann"}:
        assert any(word in name for name in names), word
