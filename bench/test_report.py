"""The report: on rows as the code that measures makes them, with made-up times of a made-up GPU."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import fresh, gemm, measure, report
from bench.machine import machine
from bench.shapes import FRESH_PHASES, GEMM_PHASES, GRID, Cell, Problem, select
from mlp_fused import timing
from mlp_fused.timing import Ceilings, Link

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")

Row = dict[str, Any]


# Rows of every kind, measured on a CPU that passes for a GPU


class Event:
    def __init__(self, **_: object) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


def stand_ins(patch: pytest.MonkeyPatch) -> None:
    """In the place of torch's and our own ways to a GPU."""
    bytes_now = iter(range(1, 10**6))
    for owner, name, stand_in in (
        (torch.cuda, "Event", Event),
        (torch.cuda, "Stream", SimpleNamespace),
        (torch.cuda, "current_stream", SimpleNamespace),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "synchronize", lambda: None),
        (torch.cuda, "reset_peak_memory_stats", lambda: None),
        (torch.cuda, "memory_allocated", lambda: next(bytes_now)),
        (torch.cuda, "max_memory_allocated", lambda: next(bytes_now)),
        (torch.Tensor, "cuda", lambda self: self),
        (torch.Tensor, "pin_memory", lambda self: self),
        (timing, "ceilings", lambda device, dtype: Ceilings(1e12, 1e12)),
        (timing, "link", lambda device: Link(50e9, 50e9)),
        (timing.CLOCK, "synchronize", lambda: None),
        (timing.CLOCK, "event", timing.CLOCK.now),
        (timing.CLOCK, "elapsed_ms", lambda start, end: 1e3 * (end - start)),
        (timing.CLOCK, "spin", lambda seconds: None),
        (gemm, "layer_forward", lambda x, weight, bias, h, z, *_: None),
        (measure, "verify_gemm", lambda found: {"verified": {}}),
    ):
        patch.setattr(owner, name, stand_in)


def template(phase: str) -> Row:
    """A small row of a phase by `measure.measure` itself."""
    small = Problem((5, 7, 3), 4)
    if phase == "lecture":
        return {"seconds": fresh.lecture(8, cpu=True, gpu=True)}
    if phase == "warmup":
        return {"seconds": dict.fromkeys(("cold", "warm"), fresh.warmup(small, "cpu"))}
    if phase in GEMM_PHASES:
        return measure.measure(Cell("gemm", Problem((5, 7), 4), "layer_forward"), "cpu")
    row = measure.measure(Cell("odd", small, phase), "cpu")
    if phase == "training":
        row["memory"] = measure.memory(measure.Bench(small, "cpu"))
    return row


@pytest.fixture(scope="module")
def templates() -> dict[str, Row]:
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch)
        rows = {
            phase: template(phase) for phase in ("forward", "training", "copy", "layer_forward", "lecture", "warmup")
        }
    rows["first_touch"] = {"seconds": dict.fromkeys(("cold", "warm"), {"context": 0.3, "copy": 0.1, "copy_2": 0.001})}
    return rows


# A file of made-up times


def put(row: Row, **values: Any) -> None:
    """Values in the place of those that the row has; none besides."""
    assert set(values) <= set(row), f"no row has {set(values) - set(row)}"
    row.update(values)


def made_up(cell: Cell, templates: dict[str, Row], chance: random.Random) -> Row:
    """A cell's row with times that a GPU might take."""
    kind = "training" if cell.phase in ("backward", "step") else cell.phase
    row = copy.deepcopy(templates["layer_forward" if kind in GEMM_PHASES else kind])
    row |= {"id": str(cell), "family": cell.family, "phase": cell.phase, "device": "cuda"}
    if cell.phase in FRESH_PHASES:
        return row
    if cell.phase == "copy":
        nbytes = cell.problem.rows * cell.problem.widths[0] * (4 if cell.problem.dtype == "fp32" else 2)
        for kind, gbps in (("pageable", 8.0), ("pinned", 48.0), ("pinned_side_stream", 50.0)):
            put(row["copy"][kind], ms=0.01 + 1e-6 * nbytes / gbps, gbps=1e-6 * nbytes / (0.01 + 1e-6 * nbytes / gbps))
        ms = {phase: made_up_ms(cell.problem, phase, chance) for phase in row["phases"]}
        for phase, value in ms.items():
            put(row["phases"][phase], kernel_ms=value)
        copied, compute = row["copy"]["pinned_side_stream"]["ms"], max(0.15, ms["step"])
        bound = max(copied, compute)
        put(row["throughput"], copy_ms=copied, compute_ms=compute, bound_ms=bound)
        taken = {
            "to_device": row["copy"]["pageable"]["ms"] + compute,
            "non_blocking": copied + compute,
            "prefetched": bound * chance.uniform(1.0, 1.06),
            "resident": compute,
        }
        for way, each in row["throughput"]["ways"].items():
            put(each, ms=taken[way], examples_per_s=1e3 * cell.problem.rows / taken[way])
            if way != "resident":
                put(each, of_bound=bound / taken[way])
        return row
    floor = 1e-3 * made_up_ms(cell.problem, cell.phase, None)
    kernel = 1e3 * floor * chance.lognormvariate(0.4, 0.25)
    ms = max(kernel, 0.02) * chance.uniform(1, 1.02)
    put(row, ms=ms, kernel_ms=kernel, floor_s=floor, floor_ratio=1e-3 * kernel / floor, repeat_ms=ms * 1.01)
    (each,) = (each for name, each in row["baselines"].items() if name == "eager")
    names = [name for name in report.SERIES if report.is_meant(name, cell, "cuda")]
    row["baselines"] = {name: copy.deepcopy(each) for name in names}
    for name in names:
        times = {"eager": 1.8, "matmul": 0.97, "compile_max_autotune": 1.2}.get(name, 1.4)
        value = times * chance.lognormvariate(0, 0.2)
        put(row["baselines"][name], speedup=value, kernel_speedup=value)
    if "path" in row:
        put(row, path="layer")
    if cell.phase in GEMM_PHASES:
        put(row, errors={whose: {"norm": 1e-7, "entry": 1e-6} for whose in row["errors"]})
    if cell.phase != "training":
        row.pop("memory", None)
    else:
        ratio = 0.55 if cell.problem.activation == "gelu" else 1.0
        put(row["memory"], kept_ratio=ratio * chance.uniform(0.95, 1), peak_ratio=ratio * chance.uniform(0.8, 1))
    return row


def made_up_ms(problem: Problem, phase: str, chance: random.Random | None) -> float:
    """Of 2·rows·parameters FLOPs at 400 TFLOP/s, and 2 µs a kernel; with some luck."""
    parameters = sum(k * n for k, n in zip(problem.widths, problem.widths[1:]))
    rate = 50e12 if problem.dtype == "fp32" else 400e12
    ms = 1e3 * (2 if phase == "forward" else 6) * problem.rows * parameters / rate + 2e-3 * len(problem.widths)
    return ms * (1 if chance is None else chance.lognormvariate(0.3, 0.2))


MACHINE = machine() | {
    "gpu": "NVIDIA H200",
    "driver": "580.65",
    "cuda": "13.0",
    "cpu": "A CPU",
    "user_table": None,
    "distorted": None,
}


def file_in(
    folder: Path, rows: list[Row], name: str = "results.json", date: str = "2026-03-01", **changes: Any
) -> Path:
    """As pytest-benchmark writes it."""
    path = folder / name
    benchmarks = [{"name": "test", "extra_info": row} for row in rows]
    content = {"machine_info": MACHINE | changes, "datetime": f"{date}T12:00:00+00:00", "benchmarks": benchmarks}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def rows(templates: dict[str, Row]) -> dict[str, Row]:
    chance = random.Random(0)
    return {str(cell): made_up(cell, templates, chance) for cell in GRID}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Row]) -> Path:
    """The whole report, written once."""
    folder = tmp_path_factory.mktemp("report")
    path = file_in(folder, list(rows.values()))
    assert report.main([str(path), "--out", str(folder / "out")]) == 0
    return folder / "out"
