"""`--benchmark` measures the rows alone, and judges the goals at the end. A CPU measures only the small rows.

Without the flag, each row runs once and is verified, beside the tests of the tools: a smoke test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import goals, measure
from bench.machine import machine
from bench.problem import FRESH_PHASES, GRID, Cell, Problem
from mlp_fused import timing
from mlp_fused.environment import distorted

Row = Callable[[Cell, str], None]
ROWS = pytest.StashKey[list[goals.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="measure each row instead of running it once")


def measures(config: pytest.Config) -> bool:
    return config.option.benchmark or config.option.benchmark_enable or config.option.benchmark_only


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not measures(config):
        config.option.benchmark_disable = True
    elif config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("rows measured side by side would disturb each other: --benchmark goes without -n")
    elif reason := distorted():
        raise pytest.UsageError(reason)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if measures(config):
        tests = [item for item in items if not is_bench(item.nodeid)]
        config.hook.pytest_deselected(items=tests)
        items[:] = [item for item in items if is_bench(item.nodeid)]
    place = {cell: number for number, cell in enumerate(GRID)}
    order = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        cell, device = params.get("cell"), params.get("device")
        if not isinstance(cell, Cell) or not isinstance(device, str):
            continue  # a test, not a row
        order[item] = place[cell]
        if device == "cuda":
            item.add_marker(pytest.mark.gpu)
        if reason := measure.why_not(cell, device):
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: order.get(item, -1))  # rows after tests, in the grid's order: anchors first


def is_bench(nodeid: str) -> bool:
    """True for a row or another bench, False for a test of the tools."""
    return Path(nodeid.partition("::")[0]).name.startswith("bench_")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep the measured rows for the summary."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is not None and "id" in benchmark.extra_info:
        item.config.stash.setdefault(ROWS, []).append(dict(benchmark.extra_info))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if is_bench(report.nodeid)]
    reasons = Counter(report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} rows skipped: {reason.removeprefix('Skipped: ')}")
    if measures(config) and (rows := config.stash.get(ROWS, [])):
        terminalreporter.section("goals")
        for line in goals.report(rows):
            terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine())


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all copy rows, compiled before the first of them is measured; on a GPU."""
    if measures(request.config) and torch.cuda.is_available():
        measure.compile_ahead(problems_of(request.session.items))


def problems_of(items: Iterable[pytest.Item]) -> list[Problem]:
    """Each problem of the copy rows once, without the rows that are measured in a process of their own."""
    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in items]
    cells = [each["cell"] for each in params if "cell" in each]
    return list(dict.fromkeys(cell.problem for cell in cells if cell.phase == "copy"))


@pytest.fixture
def row(benchmark: Any, request: pytest.FixtureRequest) -> Row:
    """Runs one row. What pytest-benchmark shows is the host's clock over single calls, each waited for."""

    def run(cell: Cell, device: str) -> None:
        benchmark.group = cell.family
        if cell.family == "copy":
            request.getfixturevalue("compiled")
        if cell.phase in FRESH_PHASES:
            benchmark.extra_info.update(
                benchmark.pedantic(measure.measure, (cell, device), {"full": not benchmark.disabled})
            )
            return
        if benchmark.disabled:
            benchmark.pedantic(measure.prepare, (cell, device))
            return
        benchmark.extra_info.update(measure.measure(cell, device))
        once, seconds = benchmark.extra_info, measure.seconds_for_a_number(device)
        if cell.phase == "copy":
            once, seconds = once["copy"]["pinned"], measure.COPY_SECONDS
        rounds = timing.clamp(1e3 * seconds / once["ms"], 3, 100)
        timed = measure.prepare(cell, device)
        calls = iter(range(rounds))

        def setup() -> tuple[tuple[int], dict[str, Any]]:
            i = next(calls)
            timed.prepare(i)
            measure.synchronize(device)
            return (i,), {}

        def call(i: int) -> None:
            timed(i)
            measure.synchronize(device)

        benchmark.pedantic(call, setup=setup, rounds=rounds)

    return run
