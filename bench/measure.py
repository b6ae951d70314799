"""Measure one row of results: `measure(cell, device)`. pytest and gpu.py both use this code."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import BASELINES, Baseline
from bench.copies import COPY_SECONDS, measured_copies, on_the_cpu, throughput, ways
from bench.gemm import GEMM_BASELINES, KERNELS, Gemm, Kernels, gemm_for
from bench.machine import ROOT
from bench.network import Bench, bench_for, release, synchronize
from bench.problem import COPIED_PHASES, FRESH_PHASES, GEMM_PHASES, Cell, Problem
from bench.rows import CellRow, Comparison, CopyRow, FreshRow, GemmRow, Kept, Kernel, Memory, NetworkPhase, NetworkRow
from bench.work import against_floor, phase_work
from mlp_fused import timing
from mlp_fused.compiling import Compilers, NotYetError, count_workers
from mlp_fused.dtypes import DTYPES
from mlp_fused.engine.calls import run_kernels
from mlp_fused.engine.recognize import resolve
from mlp_fused.kernels import devices
from mlp_fused.kernels.language import driver
from mlp_fused.processes import run_json
from mlp_fused.reference import Layer
from mlp_fused.timing import Timed

Report = Callable[[CellRow], None]

# The limits for rows on a CPU, so that all of them together take a minute on two cores. Many CPUs multiply a hundred
# times slower in 16 bits than in 32.
CPU_FLOPS = {"fp32": 10e9, "fp16": 0.1e9, "bf16": 0.1e9}
CPU_BYTES = 0.15e9
CPU_SECONDS = 0.05  # the time for one number on a CPU
COMPILE_SECONDS = 60  # the time limit of `compile_ahead`


def why_not(cell: Cell, device: str) -> str | None:
    """Return the reason not to run a cell on a device of this machine; None if it runs."""
    if device == "cuda":
        return None if torch.cuda.is_available() else f"no CUDA device (torch {torch.__version__})"
    if cell.phase == "lecture":
        if torch.cuda.is_available():
            return "the row on the GPU also measures the product on the CPU"
        rows = cell.problem.rows
        return f"takes half a minute on a CPU; use `python -m bench.fresh lecture --cpu --rows {rows}`"
    limit, needed = CPU_FLOPS[cell.problem.dtype], phase_work(cell.problem, cell.phase, device)
    if needed.flops > limit:
        bits = "16 bits" if cell.problem.dtype != "fp32" else "fp32"
        return f"has more than {limit / 1e9:g} GFLOP in {bits}, too much for a CPU"
    if needed.bytes > CPU_BYTES:
        return f"moves more than {CPU_BYTES / 1e9:g} GB, too much for a CPU"
    return None


def seconds_for_a_number(device: str) -> float:
    """Return the seconds to spend on one number of a row."""
    return CPU_SECONDS if device == "cpu" else timing.SECONDS


def compile_ahead(problems: Sequence[Problem], compilers: Compilers | None = None) -> None:
    """Compile the kernels of FusedMLP for these problems and the current GPU, on all cores but two.

    Kernels that are not compiled here are compiled one by one at their first launch. For the copy rows, that would take
    longer than the measurement.
    """
    with compilers or _compilers() as compilers:
        # Problems that differ only in their rows often have the same kernels. Sorted by rows, they are far apart, so
        # that two processes do not compile the same kernel at once.
        compilers.ask({problem: problem for problem in sorted(problems, key=lambda problem: problem.rows)})
        deadline = time.monotonic() + COMPILE_SECONDS
        with contextlib.suppress(NotYetError):
            for problem in problems:
                compilers.wait(problem, deadline - time.monotonic())


def _compilers() -> Compilers:
    target = driver.active.get_current_target()
    return Compilers(_compile, devices.describe("cuda"), target, count_workers())


def _compile(problem: Problem) -> None:
    """Run a call on its path, in inference and in training. Call it within `compiling.compile_only`."""
    dtype, widths = DTYPES[problem.dtype], problem.widths

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    activations = [problem.activation] * (len(widths) - 2) + ["identity"]
    layers = [
        Layer(make(n, k).requires_grad_(), make(n).requires_grad_(), resolve(activation))
        for (k, n), activation in zip(pairwise(widths), activations, strict=True)
    ]
    parameters = [parameter for layer in layers for parameter in layer[:2] if parameter is not None]
    x = make(problem.rows, widths[0])
    with torch.no_grad():
        run_kernels(x, layers, dtype, None, "auto")
    y = run_kernels(x, layers, dtype, None, "auto")
    torch.autograd.grad(y, parameters, torch.empty_like(y))


def prepare(cell: Cell, device: str, kernels: Kernels = KERNELS) -> Timed:
    """Return the call that a row times, verified: a phase of FusedMLP, a kernel, or the pinned copy of a copy row.

    Raises:
        AssertionError: its result is wrong.
    """
    if cell.phase in GEMM_PHASES:
        gemm = gemm_for(cell.problem, cell.phase, device, kernels)
        gemm.verify()
        return gemm.timed("ours")
    bench = bench_for(cell.problem, device)
    if cell.phase == "copy":
        pinned, target = bench.pinned, torch.empty_like(bench.inputs[0])
        assert torch.equal(target.copy_(pinned), bench.inputs[0])
        return Timed(lambda _: target.copy_(pinned))
    timed = bench.timed(bench.model, cell.phase)
    bench.verify(timed, cell.phase)
    return timed


def measure(
    cell: Cell,
    device: str,
    report: Report = lambda row: None,
    *,
    cpu_product: bool = True,
    kernels: Kernels = KERNELS,
) -> CellRow:
    """Measure the row of a cell.

    Args:
        cell: the cell.
        device: "cpu" or "cuda".
        report: called with the unfinished row after each baseline.
        cpu_product: True if the lecture's row on a GPU also measures the product on the CPU.
        kernels: the launchers of the kernels in a gemm row.

    Raises:
        AssertionError: a result of FusedMLP is wrong. Errors of FusedMLP are raised too. The error of a baseline is a
            text in the row.
    """
    if cell.phase in FRESH_PHASES:
        return FreshRow.for_cell(cell, device, seconds=_fresh(cell, device, cpu_product))
    if cell.phase in GEMM_PHASES:
        return _measure_gemm(cell, gemm_for(cell.problem, cell.phase, device, kernels), report)
    bench = bench_for(cell.problem, device)
    try:
        if cell.phase == "copy":
            return measure_copy(cell, bench, timing.link(f"cuda:{torch.cuda.current_device()}"), report)
        return _measure_network(cell, bench, report)
    finally:
        for parameter in bench.parameters:
            parameter.grad = None


def _measure_network(cell: Cell, bench: Bench, report: Report) -> NetworkRow:
    """Measure the row of FusedMLP in one phase."""
    device, seconds = bench.device, seconds_for_a_number(bench.device)
    ours, timed = _measure_phase(bench, cell.phase, seconds)
    copies = measured_copies(bench) if device == "cuda" else None
    measured_memory = memory(bench) if cell.phase == "training" and device == "cuda" else None
    comparisons: dict[str, Comparison] = {}
    failures: dict[str, str] = {}

    def row(repeat_ms: float | None = None) -> NetworkRow:
        return NetworkRow.for_cell(
            cell,
            device,
            ours=ours,
            copies=copies,
            memory=measured_memory,
            baselines=dict(comparisons),
            failures=dict(failures),
            repeat_ms=repeat_ms,
        )

    for baseline in BASELINES:
        if baseline.applies(cell, device):
            result = _measure_baseline(bench, baseline, cell.phase, ours.timing)
            if isinstance(result, Comparison):
                comparisons[baseline.name] = result
            else:
                failures[baseline.name] = result
            report(row())
    return row(timing.time_call(timed, device, seconds).ms)


def _measure_phase(bench: Bench, phase: str, seconds: float) -> tuple[NetworkPhase, Timed]:
    """Measure FusedMLP in a phase. Return the measurement and the call that was timed."""
    problem, device = bench.problem, bench.device
    plan = bench.model.explain(problem.rows, bench.dtype)
    timed = bench.timed(bench.model, phase)
    verified, first_call_s = bench.verify(timed, phase)
    measured = timing.time_call(timed, device, seconds)
    floor = against_floor(
        phase_work(problem, phase, device), timing.ceilings(device, problem.dtype), measured.kernel_ms
    )
    ours = NetworkPhase(
        plan.path, plan.reason, plan.precision, timed.sets, verified, first_call_s, timing=measured, floor=floor
    )
    return ours, timed


def measure_copy(
    cell: Cell, bench: Bench, link: timing.Link, report: Report, clock: timing.Clock = timing.CLOCK
) -> CopyRow:
    """Measure the row of an input's copy and of the phases that compute on the input."""
    copies = measured_copies(bench, COPY_SECONDS, clock)
    copied = copies["pinned_side_stream"].ms
    loop = throughput(ways(bench), cell.problem.rows, copied, on_the_cpu(bench), clock)
    phases: dict[str, NetworkPhase] = {}

    def row() -> CopyRow:
        return CopyRow.for_cell(cell, bench.device, copies=copies, link=link, throughput=loop, phases=dict(phases))

    report(row())
    for phase in COPIED_PHASES:
        phases[phase] = _measure_phase(bench, phase, COPY_SECONDS)[0]
        report(row())
    return row()


def _measure_gemm(cell: Cell, gemm: Gemm, report: Report) -> GemmRow:
    """Measure the row of a single kernel."""
    release(gemm.device)
    timed = gemm.timed("ours")
    verified = gemm.verify()
    measured = timing.time_call(timed, gemm.device)
    floor = against_floor(gemm.plan.work, timing.ceilings(gemm.device, gemm.problem.dtype), measured.kernel_ms)
    ours = Kernel(str(gemm.tile), gemm.precision, timed.sets, verified, timing=measured, floor=floor)
    comparisons: dict[str, Comparison] = {}
    for name in GEMM_BASELINES:
        comparisons[name] = _comparison(measured, timing.time_call(gemm.timed(name), gemm.device))
        report(GemmRow.for_cell(cell, gemm.device, ours=ours, baselines=dict(comparisons)))
    repeat_ms = timing.time_call(timed, gemm.device).ms
    errors = gemm.errors() if gemm.problem.dtype == "fp32" else None
    return GemmRow.for_cell(cell, gemm.device, ours=ours, baselines=comparisons, repeat_ms=repeat_ms, errors=errors)


def _comparison(ours: timing.Timing, theirs: timing.Timing, **values: Any) -> Comparison:
    """Return the comparison of a baseline's timing with ours."""
    return Comparison(theirs, theirs.ms / ours.ms, theirs.kernel_ms / ours.kernel_ms, **values)


def memory(bench: Bench) -> Memory:
    """Measure the memory of a forward and backward, ours and eager's."""
    return Memory(_memory(bench, bench.model), _memory(bench, bench.eager))


def _memory(bench: Bench, module: nn.Module) -> Kept:
    x, dy, parameters = bench.inputs[0], bench.gradients[0], bench.parameters
    synchronize(bench.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = module(x)
    saved = torch.cuda.memory_allocated() - before
    gradients = torch.autograd.grad(y, parameters, dy)
    peak = torch.cuda.max_memory_allocated() - before
    del y, gradients
    return Kept(saved, peak)


def _measure_baseline(bench: Bench, baseline: Baseline, phase: str, ours: timing.Timing) -> Comparison | str:
    """Measure a baseline. Return its comparison with ours, or the text of its error.

    Raises:
        RuntimeError: the baseline's error left the device unusable, so that nothing can run after it.
    """
    try:
        timed = baseline.build(bench, phase)
        verified, first_call_s = bench.verify(timed, phase, baseline.reference(bench.eager))
        compile_s = None
        if baseline.name.startswith("compile"):  # one graph for inference, one for the three phases with gradients
            compile_s = bench.compile_seconds.setdefault((baseline.name, phase == "forward"), first_call_s)
        measured = timing.time_call(timed, bench.device, seconds_for_a_number(bench.device))
        return _comparison(ours, measured, verified=verified, first_call_s=first_call_s, compile_s=compile_s)
    except Exception as error:
        return describe(error)
    finally:
        timed = None  # type: ignore[assignment]  # free the pool of a CUDA graph before the next baseline
        for parameter in bench.parameters:
            parameter.grad = None
        synchronize(bench.device)
        release(bench.device)


def describe(error: BaseException) -> str:
    """Return the class of an error and the first lines of its text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"


def _fresh(cell: Cell, device: str, cpu_product: bool) -> dict[str, dict[str, float]]:
    """Run fresh.py. Return its seconds by name, with Triton's cache empty ("cold") and filled ("warm").

    The lecture has no Triton kernel and runs once ("any"). With `cpu_product`, it also measures the product on the CPU.
    """
    problem = cell.problem
    arguments = [cell.phase, "--rows", str(problem.rows), "--dtype", problem.dtype]
    arguments += ["--activation", problem.activation, "--widths", *map(str, problem.widths)]

    def run(**changes: str) -> Any:
        return run_json("bench.fresh", *arguments, environment=os.environ | changes, folder=ROOT)

    if cell.phase == "lecture":
        arguments += ["--gpu"] * (device == "cuda") + ["--cpu"] * (cpu_product or device == "cpu")
        return {"any": run()}
    with tempfile.TemporaryDirectory() as cache:
        return {state: run(TRITON_CACHE_DIR=cache) for state in ("cold", "warm")}
