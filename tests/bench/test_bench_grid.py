"""The rows of the grid: a model of their total time, and the words that select them."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from readme import READMES
from stand_ins import (
    HostAndDevice,
    environment,
)

from bench import measure
from bench.copies import COPIED_CPU_FLOPS, COPY_SECONDS, throughput
from bench.machine import ROOT
from bench.problem import FAMILIES, GRID, Cell, Problem, cases
from bench.work import phase_work
from mlp_fused import timing
from mlp_fused.timing import Timed

# The assumptions of the model for the time of copy rows, in bytes/s, FLOP/s and seconds.
LINK, PAGEABLE = 40e9, 8e9
FRESH = 2e9  # first write to memory of the host; pinned memory is reused
MEMORY, FLOPS = 2e12, {"fp32": 50e12, "bf16": 500e12}  # for the kernels and for eager, which verifies them
ROW = 0.25  # building the model, collecting garbage, pytest itself
KERNELS, KERNEL, CORES = 199, 1.3, 14  # kernels of the copy rows on an H100, seconds for each, and compiling processes
PROCESS = 8  # seconds of a process that imports torch, creates a context and compiles the kernels of one network
CPU_FLOPS = 0.5e12
STARTING = 8  # pytest, torch and its compiler imported, the ceilings and the link measured


def copy_row_seconds(problem: Problem) -> float:
    """The seconds of a copy row, by running the measuring code on a simulated host, device and link."""
    clock = HostAndDevice()
    nbytes = problem.rows * problem.widths[0] * (4 if problem.dtype == "fp32" else 2)

    @functools.cache
    def work(phase: str) -> float:
        return phase_work(problem, phase, "cpu").floor(FLOPS[problem.dtype], MEMORY)

    def with_copy(seconds: float, **how: bool) -> Timed:
        def call(_: int) -> None:
            clock.copy(seconds, **how)
            clock.compute(work("training"))

        return Timed(call)

    def copy_alone(seconds: float, waits: bool) -> Timed:
        return Timed(lambda _: clock.copy(seconds, waits=waits), waits=waits)

    def compute(phase: str) -> Callable[[int], None]:
        return lambda _: clock.compute(work(phase))

    clock.host += ROW + nbytes / FRESH + 2 * nbytes / PAGEABLE  # host write, two copies to pinned memory
    # Verification runs three phases and the resident way, for ours and for eager.
    for phase in (*2 * ["forward"], *6 * ["training"]):
        clock.compute(work(phase))
    for rate, waits in ((PAGEABLE, True), (LINK, True), (LINK, False)):
        timing.time_apart(copy_alone(nbytes / rate, waits), COPY_SECONDS, clock)
    by_way = {
        "to_device": with_copy(nbytes / PAGEABLE, waits=True),
        "non_blocking": with_copy(nbytes / LINK),
        "prefetched": with_copy(nbytes / LINK, aside=True),
        "resident": Timed(compute("training")),
    }
    flops = phase_work(problem, "training", "cpu").flops
    cpu = None
    if flops <= COPIED_CPU_FLOPS and problem.dtype == "fp32":

        def on_the_cpu(_: int) -> None:
            clock.host += flops / CPU_FLOPS + 3e-4

        cpu = Timed(on_the_cpu)
    throughput(by_way, problem.rows, 1e3 * nbytes / LINK, cpu, clock)
    for timed in (
        Timed(compute("forward")),
        Timed(compute("backward"), setup=compute("forward")),
        Timed(compute("step")),
    ):
        timing.time_cuda(timed, COPY_SECONDS, clock)
    clock.synchronize()
    return clock.now() + max(COPY_SECONDS, 3 * nbytes / LINK)  # and the repetitions of pytest-benchmark


def test_the_copy_rows_take_less_than_three_minutes_of_a_gpu() -> None:
    cells = [cell for cell, device in cases("copy") if device == "cuda"]
    rows = sum(copy_row_seconds(cell.problem) for cell in cells if cell.phase == "copy")
    (lecture,) = (cell.problem for cell in cells if cell.phase == "lecture")
    on_the_cpu = 2 * 2 * lecture.rows**3 / CPU_FLOPS
    compiling = PROCESS + KERNELS * KERNEL / CORES
    assert compiling < measure.COMPILE_SECONDS
    processes = 3 * PROCESS  # for the lecture, and for the first touch with an empty and a filled cache of Triton
    assert 30 < rows < 120
    assert STARTING + rows + compiling + processes + on_the_cpu < 180


def cpu_row_seconds(cell: Cell) -> float:
    """The seconds of a row on a simulated host with two cores, by running the measuring code."""
    clock = HostAndDevice()
    work = phase_work(cell.problem, cell.phase, "cpu")
    rate = 40e9 if cell.problem.dtype == "fp32" else 2e9

    def call(_: int) -> None:
        clock.host += work.flops / rate + work.bytes / 4e9 + 1e-4

    # Three results are verified, with two calls each: ours, the baseline's, and ours again for pytest-benchmark.
    for _ in range(2 * 3):
        call(0)
    for _ in range(3):  # ours, eager, and the repetition
        timing.time_cpu(Timed(call), measure.CPU_SECONDS, clock)
    for _ in range(3):  # the fewest calls of pytest-benchmark, which otherwise takes CPU_SECONDS
        call(0)
    return clock.now() + measure.CPU_SECONDS + ROW


def test_the_rows_of_a_cpu_take_less_than_a_minute_of_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cells = [cell for cell in GRID if "cpu" in cell.devices and measure.why_not(cell, "cpu") is None]
    assert {cell.family for cell in cells} == {"seed", "narrow", "odd"}
    assert {cell.problem.dtype for cell in cells} == {"fp32", "fp16", "bf16"}
    assert {cell.phase for cell in cells} == {"forward", "backward", "training", "step"}
    assert 10 < sum(map(cpu_row_seconds, cells)) < 60


def words_after_k() -> set[str]:
    """Each `-k WORD` of a bench command in a README or a docstring."""
    files = [
        *(ROOT / name for name in READMES),
        *(path for folder in ("bench", "kernels", "mlp_fused") for path in (ROOT / folder).rglob("*")),
    ]
    texts = [path.read_text() for path in files if path.suffix in (".md", ".py") and path.is_file()]
    return {word for text in texts for word in re.findall(r"""bench[^`\n]* -k ["']?(\w+)""", text)}


def test_each_word_of_the_readmes_selects_a_row() -> None:
    words = words_after_k()
    assert {"seed", "copy"} <= words
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120).stdout
    names = [line.partition("::")[2].lower() for line in collected.splitlines() if "bench_" in line]
    for word in words | set(FAMILIES) | {"call", "dropout", "compiled", "tinycudann"}:
        assert any(word in name for name in names), word
