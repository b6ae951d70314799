"""The tuner's time budget: its order of measurements, with kernels compiled ahead or too late."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_tuning import CPU, DIMS, FAST, PRODUCTS, SLOW, Clock, path, run, tuning_clock

from mlp_fused.compiling import Compilers, NotYetError
from mlp_fused.engine import table_files
from mlp_fused.grid import GRID
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import DEVICES, INTERPRETED_DEVICE
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.tune import compile_ahead, tuner
from mlp_fused.tune.config import Config
from mlp_fused.tune.tasks import Product, Whole, list_tasks, products
from mlp_fused.tune.tuner import tune


@pytest.fixture
def clock() -> Clock:
    return tuning_clock()


def test_the_time_is_shared_and_missing_readings_are_reported(clock: Clock, table_folder: Path) -> None:
    clock.reading_seconds = 10.0
    table, messages = run(clock, dataclasses.replace(DIMS, minutes=2.0))
    # 120 s over 6 products are 20 s each, which torch and the first tile take.
    assert clock.timed == ["torch", SLOW] * PRODUCTS
    assert [row.tile for row in table.gemms] == [SLOW] * PRODUCTS
    clock.timed.clear()
    os.unlink(path())
    table, messages = run(clock, dataclasses.replace(DIMS, minutes=0.5))
    assert clock.timed == ["torch", SLOW] * 2
    assert len(table.gemms) == 2
    missed = next(
        product for product in products(DIMS.workloads[0]) if product.key not in [row.key for row in table.gemms]
    )
    assert f"4 of 6 problems were not measured, from {missed} on; run the same command again" in messages
    assert f"measured 2 of 6 problems; the table is {path()}" in messages
    # A second run measures missing rows before existing ones.
    table, messages = run(clock, dataclasses.replace(DIMS, minutes=1.0))
    assert len(table.gemms) == 5
    table, messages = run(clock)
    assert len(table.gemms) == 6


def test_time_that_a_product_saves_goes_to_others(clock: Clock, table_folder: Path) -> None:
    """A product that ends early leaves its time to the rest. A slow one takes time from them."""
    clock.reading_seconds = 0.0
    run(clock, dataclasses.replace(DIMS, minutes=0.01))
    assert clock.timed == ["torch", SLOW, FAST] * PRODUCTS


class GivenOutcomes(Compilers):
    """Compilers that finish at once, except for the given outcomes."""

    def __init__(self, outcomes: dict[TileConfig | str, str | type[Exception] | None]) -> None:
        super().__init__(compile_ahead.compile_ahead, INTERPRETED_DEVICE, None, 0)
        self.outcomes = outcomes
        self.asked: dict[Any, Any] = {}

    def ask(self, work: Any, first: bool = False) -> None:
        self.asked = {**work, **self.asked} if first else {**self.asked, **work}

    def wait(self, key: Any, seconds: float) -> str | None:
        work = self.asked[key]
        outcome = self.outcomes.get(work.tile if isinstance(work, compile_ahead.TileWork) else work.path)
        if outcome is NotYetError:
            raise NotYetError
        return outcome  # type: ignore[return-value]


def test_tiles_that_do_not_compile_are_skipped(clock: Clock, table_folder: Path) -> None:
    messages: list[str] = []
    compilers = GivenOutcomes({FAST: "the process that compiled it ended with status -6"})
    table = tune(
        DIMS, report=messages.append, device=CPU, time=clock, now=lambda: clock.now, compilers=compilers, **clock.parts
    )
    assert [row.tile for row in table.gemms] == [SLOW] * PRODUCTS
    assert (
        sum(f"{FAST} was left out: the process that compiled it ended with status -6" in line for line in messages) == 6
    )
    compilers = GivenOutcomes({})
    compilers.failure = "they end with status 1"
    tune(
        DIMS, report=messages.append, device=CPU, time=clock, now=lambda: clock.now, compilers=compilers, **clock.parts
    )
    assert "kernels were compiled at their launch, because compiling ahead failed: they end with status 1" in messages


def test_tiles_not_compiled_in_time_are_not_measured(clock: Clock, table_folder: Path) -> None:
    messages: list[str] = []

    def tuned(outcomes: dict[Any, Any]) -> table_files.Table:
        compilers = GivenOutcomes(outcomes)
        return tune(
            DIMS,
            report=messages.append,
            device=CPU,
            time=clock,
            now=lambda: clock.now,
            compilers=compilers,
            **clock.parts,
        )

    assert [row.tile for row in tuned({FAST: NotYetError}).gemms] == [SLOW] * PRODUCTS
    path().unlink()
    assert tuned({SLOW: NotYetError}).gemms == ()  # a row that says that torch is faster would be a guess
    assert any(line.startswith("6 of 6 problems were not measured") for line in messages)


def test_the_tile_of_a_row_that_is_measured_again_is_not_lost(clock: Clock, table_folder: Path) -> None:
    run(clock)
    clock.reading_seconds = 10.0
    clock.timed.clear()
    table, _ = run(clock, dataclasses.replace(DIMS, minutes=2.0))
    assert clock.timed == ["torch", FAST] * PRODUCTS  # there was time for one tile each
    assert [row.tile for row in table.gemms] == [FAST] * PRODUCTS


class SimulatedMachine(Compilers):
    """A simulation of time on a machine with a GPU and 16 cores, which compile while the tuner measures."""

    BOOT = 8.0  # seconds to start a process
    TILE, PATH = 2.0, 8.0  # seconds to compile a tile of a product, and a path of a network
    LAYER = 3.0  # seconds to compile the other kernels of a path of layers

    def __init__(self) -> None:
        super().__init__(compile_ahead.compile_ahead, DEVICES["NVIDIA H200"], None, 0)
        self.now = 0.0
        self.reading = 0.0  # seconds of a reading, including its preparation and check
        self.free = [self.BOOT] * 14
        self.queue: dict[Any, Any] = {}
        self.done: dict[Any, float] = {}

    def ask(self, work: Any, first: bool = False) -> None:
        self.work()
        new = {key: problem for key, problem in work.items() if key not in self.done}
        self.queue = {**new, **self.queue} if first else {**self.queue, **new}

    def work(self) -> None:
        """Begin the work that free processes can take."""
        while self.queue and min(self.free) <= self.now:
            self.begin(next(iter(self.queue)))

    def begin(self, key: Any) -> None:
        work = self.queue.pop(key)
        seconds = self.TILE if isinstance(work, compile_ahead.TileWork) else self.LAYER if work.table else self.PATH
        self.free.sort()
        self.done[key] = self.free[0] = max(self.free[0], self.now - seconds) + seconds

    def wait(self, key: Any, seconds: float) -> str | None:
        self.work()
        if key in self.queue:
            self.begin(key)
        if self.done[key] > self.now + seconds:
            self.now += max(0.0, seconds)
            raise NotYetError
        self.now = max(self.now, self.done[key])
        return None

    def read(self, call: Callable[[], object]) -> float:
        self.now += self.reading
        return 1e-3


def shares(seconds: float) -> dict[str, tuple[int, float, float]]:
    """For each part of the grid: the number of its problems, and the fractions of problems and candidates measured."""
    counts: dict[Any, int] = {}

    class NoOperands:
        def __init__(self, product: Product, device: torch.device) -> None:
            self.key = product.key

        def turns(self, run: Callable[..., object]) -> Callable[..., object]:
            return run

        def written(self, run: Callable[[int], object]) -> list[torch.Tensor]:
            run(0)
            return [torch.ones(1)]

        def in_float32(self) -> list[torch.Tensor]:
            return [torch.ones(1)]

        def by_torch(self, index: int) -> None:
            pass

        def by_kernel(self, index: int, tile: TileConfig) -> None:
            counts[self.key] = counts.get(self.key, 0) + 1

    class NoPasses(NoOperands):
        by_layers = by_network = NoOperands.by_torch

        def __call__(self, path: Callable[..., Any], index: int) -> list[torch.Tensor]:
            counts[self.key] = counts.get(self.key, 0) + 1
            return [torch.ones(1)]

    machine, device = SimulatedMachine(), DEVICES["NVIDIA H200"]
    empty = table_files.Table(device.name, "2026-01-31T12:00:00+00:00", tuner.versions())
    simulated = tuner.Tuner(
        CPU, device, machine.read, lambda: machine.now, machine, empty, lambda rows: empty, NoOperands, NoPasses
    )
    asked = list_tasks(Config().workloads, device)
    machine.reading = tuner.AROUND_READING + tuner.reading_seconds(seconds, sum(map(simulated.count_readings, asked)))
    simulated.measure(asked, seconds)
    assert machine.now < seconds + SimulatedMachine.PATH
    parts: dict[str, list[tuple[int, float]]] = {}
    family = {workload: index for index, part in enumerate(GRID) for workload in part.workloads}
    keys = {product.key: family[work] for work in family for product in products(work)}
    for task in asked:
        part = "networks" if isinstance(task, Whole) else f"family {keys[task.key]}"
        part = "anchors" if task.anchor and isinstance(task, Product) else part
        wanted = 1
        if isinstance(task, Product):
            candidates = len(layer_tiles.candidates(task.problem, device))
            wanted = candidates if task.anchor else min(tuner.FEW, candidates)
        count = counts.get(task.key, 0)
        parts.setdefault(part, []).append((count > 0, min(1.0, count / wanted)))
    return {
        part: (len(columns), *(sum(column) / len(columns) for column in zip(*columns)))  # type: ignore[misc]
        for part, columns in parts.items()
    }


def test_in_three_minutes_every_problem_of_the_grid_has_readings() -> None:
    """`bench/gpu.py --minutes 10 --tests-share 0 --tune-share 0.66` leaves the tuner this time after the anchors."""
    parts = shares(180)
    assert all(reached == 1 for _, reached, _ in parts.values())
    assert parts["anchors"][2] == 1  # every candidate
    assert parts["networks"][2] == 1  # every path


@pytest.mark.parametrize(("seconds", "readings", "expected"), [(10, 1000, 0.01), (100, 1000, 0.03), (3600, 1000, 0.05)])
def test_a_reading_is_shorter_if_time_is_short(seconds: float, readings: int, expected: float) -> None:
    assert tuner.reading_seconds(seconds, readings) == pytest.approx(expected)


def test_eight_minutes_of_a_gpu_reach_every_problem() -> None:
    """102 s are enough to tune the anchors, and 337 s to reach every problem.

    `bench/gpu.py --minutes 8 --tests-share 0 --tune-share 0.75` gives the tuner 337 s once the anchors have rows.
    """
    families = {f"family {index}" for index in range(len(GRID))}
    long = shares(337)
    assert set(long) == {"anchors", "networks", *families}
    assert all(reached == 1 for _, reached, _ in long.values())
    assert long["anchors"][2] == 1  # every candidate
    assert long["networks"][2] == 1
    # On average, at least 0.7 of the first `tuner.FEW` candidates were measured.
    assert {part: few for part, (_, _, few) in long.items() if few < 0.7} == {}
    short = shares(102)
    assert short["anchors"][1:] == (1, pytest.approx(1, abs=0.1))
    hour = shares(3600)
    assert all(few == 1 for _, _, few in hour.values())
