"""The code that measures a row, on a CPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import (
    CELLS,
    SMALL,
    HostClock,
    environment,
    timed,
)
from torch import nn

from bench import gpu, measure
from bench.baselines import Baseline
from bench.copies import WAYS
from bench.machine import ROOT
from bench.network import Bench
from bench.problem import Cell, Problem, select
from bench.rows import CopyRow, Kept, Memory, NetworkRow, Row, from_json, to_json
from mlp_fused.compiling import NotYetError
from mlp_fused.timing import Link, Timed


def test_reasons_to_skip_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(pattern: str, device: str) -> str | None:
        return measure.why_not(select(pattern)[0], device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason("seed-*-m64-step", "cpu") is None
    assert reason("narrow-128x128x128x128x128-relu-fp32-m1048576-forward", "cpu") == (
        "has more than 10 GFLOP in fp32, too much for a CPU"
    )
    assert reason("middle-256*-m4096-forward", "cpu") == "has more than 0.1 GFLOP in 16 bits, too much for a CPU"
    assert reason("narrow-16x*-fp32-m2097152-forward", "cpu") == "moves more than 0.15 GB, too much for a CPU"
    assert "use `python -m bench.fresh lecture --cpu --rows 10000`" in str(reason("*-lecture", "cpu"))
    assert "no CUDA device" in str(reason("seed-*", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason("large-*-m32768-step", "cuda") is None
    assert reason("*-lecture", "cpu") == "the row on the GPU also measures the product on the CPU"


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_row_is_complete(cell: Cell) -> None:
    reported: list[Row] = []
    row = measure.measure(cell, "cpu", reported.append)
    assert isinstance(row, NetworkRow)
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
    assert row.id == str(cell)
    ours, eager = row.ours, row.baselines["eager"]
    assert ours.path == "reference"
    assert ours.timing.ms > 0
    assert row.repeat_ms is not None
    assert row.repeat_ms > 0
    assert ours.floor.ratio == pytest.approx(1e-3 * ours.timing.kernel_ms / ours.floor.seconds)
    assert eager.speedup == pytest.approx(eager.timing.ms / ours.timing.ms)
    assert row.copies is None
    assert reported == [replace(row, repeat_ms=None)]
    assert "ms, " in gpu.summary(row)


def test_a_copy_row_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    cell, link = Cell("copy", SMALL, "copy"), Link(50e9, 40e9)
    reported: list[Row] = []
    row = measure.measure_copy(cell, Bench(SMALL, "cpu"), link, reported.append, HostClock())
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
    assert row.link == link
    assert list(row.copies) == ["pageable", "pinned", "pinned_side_stream"]
    assert all(copied.nbytes == pytest.approx(4 * 5 * 4) for copied in row.copies.values())
    assert row.throughput.copy_ms == row.copies["pinned_side_stream"].ms
    assert list(row.throughput.ways) == list(WAYS)
    assert row.throughput.cpu_ms is not None
    assert list(row.phases) == ["forward", "backward", "step"]
    assert [len(row.phases) for row in reported if isinstance(row, CopyRow)] == [0, 1, 2, 3]
    assert "of the bound" in gpu.summary(row)


def test_the_smallest_kernels_are_compiled_first() -> None:
    asked: list[Problem] = []

    class Compilers(contextlib.nullcontext[Any]):
        def __init__(self) -> None:
            super().__init__(self)

        def ask(self, work: dict[Problem, Problem]) -> None:
            asked.extend(work)

        def wait(self, key: Problem, seconds: float) -> None:
            assert key in asked
            assert 0 < seconds <= measure.COMPILE_SECONDS
            raise NotYetError

    measure.compile_ahead([Problem((5, 3), rows) for rows in (8, 2, 4)], Compilers())
    assert [problem.rows for problem in asked] == [2, 4, 8]


def test_every_launched_kernel_was_compiled_ahead() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    script = """
from bench import measure
from bench.problem import Problem
from mlp_fused.compiling import compile_only
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.launch import launched_by

def say(launch, tensors):
    print(launch.kernel.__name__)

with compile_only(DEVICES["NVIDIA H100"], None), launched_by(say):
    for problem in (Problem((64, 64, 64), 2**20, "bf16"), Problem((784, 512, 10), 64)):
        measure._compile(problem)
"""
    variables = environment() | {"MLP_FUSED_BACKEND": "triton"}  # no product runs by torch
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    launched = child.stdout.split()
    assert launched.count("network_forward_kernel") >= 1
    assert launched.count("layer_forward_kernel") == 2 * 2  # two in inference and two in training
    assert launched.count("dgrad_kernel") == 1
    assert launched.count("wgrad_kernel") == 2


def test_memory_of_a_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate modules whose forward and backward allocate the same number of bytes."""
    bench = Bench(SMALL, "cpu")
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
    actual = measure.memory(bench)
    assert actual == Memory(Kept(3, 6), Kept(4, 8))
    assert actual.kept_ratio == actual.peak_ratio == 0.75


def test_a_failing_baseline_is_recorded_as_text() -> None:
    def build(bench: Bench, phase: str) -> Timed:
        raise torch.OutOfMemoryError("CUDA out of memory.\n\nTried to allocate 2 GiB")

    bench = Bench(SMALL, "cpu")
    actual = measure._measure_baseline(bench, Baseline("large", build), "forward", timed(1.0))
    assert actual == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
