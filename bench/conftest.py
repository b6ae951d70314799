"""`pytest bench --benchmark` measures the rows and prints the goals at the end. On a CPU it measures small rows only.

Without the flag, each row runs once and is verified.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from bench import goals
from bench.copies import COPY_SECONDS
from bench.machine import machine
from bench.measure import compile_ahead, measure, prepare, seconds_for_a_number, why_not
from bench.network import synchronize
from bench.problem import FRESH_PHASES, GRID, Cell, Problem
from bench.rows import CopyRow, TimedRow, from_json, to_json
from bench.rows import Row as MeasuredRow
from mlp_fused import timing
from mlp_fused.environment import distorted

Row = Callable[[Cell, str], None]
ROWS = pytest.StashKey[list[MeasuredRow]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="measure each row instead of running it once")


def measures(config: pytest.Config) -> bool:
    """True if rows are measured, not just run once."""
    option = config.option
    return bool(option.benchmark or option.benchmark_enable or option.benchmark_only)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuse to measure in parallel, or with a switch that distorts times."""
    if not measures(config):
        config.option.benchmark_disable = True
    elif config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark does not work with -n, because rows in parallel would disturb each other")
    elif reason := distorted():
        raise pytest.UsageError(reason)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the rows in the order of the grid, mark those of a GPU, and skip those that do not run here."""
    position = {cell: number for number, cell in enumerate(GRID)}
    order = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        cell, device = params.get("cell"), params.get("device")
        if not isinstance(cell, Cell) or not isinstance(device, str):
            continue
        order[item] = position[cell]
        if device == "cuda":
            item.add_marker(pytest.mark.gpu)
        if reason := why_not(cell, device):
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: order.get(item, -1))  # other benches first, then the grid's rows in its order


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Store the measured row for the summary."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is not None and "id" in benchmark.extra_info:
        item.config.stash.setdefault(ROWS, []).append(from_json(benchmark.extra_info))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the reasons of skipped rows, and the report on the goals."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} rows skipped: {reason.removeprefix('Skipped: ')}")
    if measures(config) and (rows := config.stash.get(ROWS, [])):
        terminalreporter.section("goals")
        for line in goals.report(rows):
            terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the description of the machine to pytest-benchmark's file."""
    machine_info.update(machine())


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> None:
    """Compile the kernels of all copy rows on a GPU, before the first of these rows is measured."""
    if measures(request.config) and torch.cuda.is_available():
        compile_ahead(copy_problems(request.session.items))


def copy_problems(items: Iterable[pytest.Item]) -> list[Problem]:
    """Return the problems of the copy rows, without duplicates and without the rows that start new processes."""
    all_params = [getattr(getattr(item, "callspec", None), "params", {}) for item in items]
    cells = [params["cell"] for params in all_params if "cell" in params]
    return list(dict.fromkeys(cell.problem for cell in cells if cell.phase == "copy"))


@pytest.fixture
def row(benchmark: Any, request: pytest.FixtureRequest) -> Row:
    """Return a function that runs one row.

    pytest-benchmark's own table shows single calls by the host's clock, with a synchronization after each.
    """

    def run(cell: Cell, device: str) -> None:
        benchmark.group = cell.family
        if cell.family == "copy":
            request.getfixturevalue("compiled")
        if cell.phase in FRESH_PHASES:
            measured = benchmark.pedantic(measure, (cell, device), {"cpu_product": not benchmark.disabled})
            benchmark.extra_info.update(to_json(measured))
            return
        if benchmark.disabled:
            benchmark.pedantic(prepare, (cell, device))
            return
        measured = measure(cell, device)
        benchmark.extra_info.update(to_json(measured))
        if isinstance(measured, CopyRow):
            rounds = timing.clamp(1e3 * COPY_SECONDS / measured.copies["pinned"].ms, 3, 100)
        else:
            assert isinstance(measured, TimedRow)
            rounds = timing.clamp(1e3 * seconds_for_a_number(device) / measured.ours.timing.ms, 3, 100)
        timed = prepare(cell, device)
        calls = iter(range(rounds))

        def setup() -> tuple[tuple[int], dict[str, Any]]:
            i = next(calls)
            timed.prepare(i)
            synchronize(device)
            return (i,), {}

        def call(i: int) -> None:
            timed(i)
            synchronize(device)

        benchmark.pedantic(call, setup=setup, rounds=rounds)

    return run
