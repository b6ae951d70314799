"""gpu.py without a GPU: the order and the time of the work, the file, the worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import (
    ANCHOR_CELLS,
    CELLS,
    network_row,
)

from bench import gpu
from bench.machine import ROOT
from bench.problem import ANCHORS, GRID, Cell, Problem, select
from bench.rows import (
    CellRow,
    FailedRow,
    FreshRow,
)
from mlp_fused.environment import DISTORTING

MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "source": "abc"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Simulated:
    """A worker whose rows take the given time or raise. Compiling and the ceilings take `ahead` each."""

    def __init__(
        self, clock: Clock, outcomes: dict[int, float | Exception], usual: float = 2.0, ahead: float = 5.0
    ) -> None:
        self.clock, self.outcomes, self.usual, self.ahead = clock, outcomes, usual, ahead
        self.asked = list[tuple[Cell, float]]()
        self.compiled = list[list[Problem]]()

    def measure(self, cell: Cell, seconds: float) -> CellRow:
        outcome = self.outcomes.get(len(self.asked), self.usual)
        self.asked.append((cell, seconds))
        if isinstance(outcome, Exception):
            raise outcome
        self.take(outcome, seconds, network_row(cell))
        return FreshRow.for_cell(cell, "cuda", seconds={"cold": {"context": 1.0}})

    def take(self, needed: float, seconds: float, partial: CellRow | None = None) -> None:
        self.clock.now += min(needed, seconds)
        if needed > seconds:
            raise gpu.CutOffError(f"stopped after {seconds:.0f} s", partial)

    def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
        self.compiled.append(problems)
        self.take(self.ahead, seconds)

    def ceilings(self, seconds: float) -> dict[str, Any]:
        self.take(self.ahead, seconds)
        return {}

    def close(self) -> None: ...


def results_in(directory: Path, **changes: Any) -> gpu.Results:
    return gpu.Results(directory, MACHINE | changes, "nvidia_h200")


def run(results: gpu.Results, outcomes: dict[int, float | Exception], limit: float = 1e9) -> tuple[int, list[str]]:
    clock, messages = Clock(), list[str]()
    plan = gpu.Plan(results, Path(), Simulated(clock, outcomes), limit, clock=clock, say=messages.append)
    return plan.run_rows(results.todo(CELLS)), messages


def test_rows_are_written_one_by_one_and_not_run_again(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    done, messages = run(results, {1: 15.0}, limit=20.0)
    assert (done, len(messages)) == (2, 2)
    assert list(json.loads((tmp_path / "nvidia_h200.json").read_text())["rows"]) == [str(cell) for cell in CELLS[:2]]
    again = results_in(tmp_path)
    assert again.note is None
    assert again.todo(CELLS) == CELLS[2:]
    assert run(again, {})[0] == 2
    assert results_in(tmp_path).todo(CELLS) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_row_is_recorded_and_the_rest_run(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    done, messages = run(results, {0: gpu.RowError("AssertionError: wrong", network_row(CELLS[0]))})
    assert done == 4
    failed = results.rows[str(CELLS[0])]
    assert isinstance(failed, FailedRow)
    assert (failed.error, failed.measured) == ("AssertionError: wrong", network_row(CELLS[0]))
    assert "failed: AssertionError: wrong" in messages[0]
    assert results_in(tmp_path).todo(CELLS) == []
    assert results_in(tmp_path).todo(CELLS, retry=True) == CELLS[:1]


def test_a_row_past_its_limit_is_an_error_but_a_row_cut_off_by_the_end_is_not(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    done, messages = run(results, {0: 1e6, 1: 1e6}, limit=gpu.ROW_SECONDS + 50.0)
    assert done == 2
    failed = results.rows[str(CELLS[0])]
    assert isinstance(failed, FailedRow)
    assert (failed.error, failed.unfinished) == (f"stopped after {gpu.ROW_SECONDS:.0f} s", None)
    assert "unfinished: stopped after 50 s" in messages[-1]
    cut_off = results_in(tmp_path).rows[str(CELLS[1])]
    assert isinstance(cut_off, FailedRow)
    assert (cut_off.unfinished, cut_off.measured) == (50.0, network_row(CELLS[1]))
    assert results_in(tmp_path).todo(CELLS) == CELLS[1:]


def test_an_unfinished_row_is_measured_again_only_with_more_time(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    run(results, {0: 1e6}, limit=30.0)
    before = dict(results.rows)
    assert list(before) == [str(CELLS[0])]
    assert run(results, {}, limit=20.0)[0] == 3  # the other rows
    assert results.rows[str(CELLS[0])] == before[str(CELLS[0])]
    assert run(results, {}, limit=40.0)[0] == 1
    assert results.todo(CELLS) == []


class Commands:
    """Commands that take the time they need, or the time they are given if that is less."""

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


def ten_minutes(
    results: gpu.Results,
    needed: dict[str, float],
    tests_share: float = gpu.TESTS_SHARE,
    tune_share: float = gpu.TUNE_SHARE,
    **rows: Any,
) -> tuple[Commands, Simulated, Clock]:
    """Run gpu.py's plan for ten minutes with commands and rows of the given times."""
    clock = Clock()
    commands, worker = Commands(clock, **needed), Simulated(clock, {}, **rows)
    plan = gpu.Plan(results, results.path.parent, worker, 600 - gpu.RESERVE, commands, clock, say=lambda line: None)
    todo = results.todo(GRID)
    plan.tests_and_tuner(sum(cell.anchor for cell in todo), tests_share, tune_share)
    plan.measure(todo)
    assert clock.now <= 600 - gpu.RESERVE
    return commands, worker, clock


@pytest.mark.parametrize("slow", [("tests",), ("tests_alone",), ("tune",), ("tests", "tests_alone", "tune")], ids=str)
def test_the_anchors_have_rows_after_ten_minutes_with_slow_tests_and_tuner(
    slow: tuple[str, ...], tmp_path: Path
) -> None:
    results = results_in(tmp_path)
    commands, _, _ = ten_minutes(results, QUICK | dict.fromkeys(slow, FOREVER), usual=24.0)
    given = dict(commands.ran)
    assert given["tests"] == pytest.approx(240, abs=2)
    assert ("tune" in given) == (slow == ("tune",))
    assert [cell for cell in ANCHOR_CELLS if not isinstance(results.rows.get(str(cell)), FreshRow)] == []
    assert results.content["tests"]["finished"] == (slow == ("tune",))


def test_quick_tests_leave_their_time_to_the_tuner_and_to_rows(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    commands, worker, clock = ten_minutes(results, QUICK)
    assert dict(commands.ran)["tune"] == pytest.approx(gpu.TUNE_SHARE * (300 - 140), abs=2)
    assert results.content["tests"] == {"finished": True, "status": 0, "summary": "tests; tests_alone", "seconds": 140}
    assert [cell for cell, _ in worker.asked[: len(ANCHORS)]] == ANCHOR_CELLS
    assert len(worker.asked) > 5 * len(ANCHORS)
    assert clock.now == pytest.approx(600 - gpu.RESERVE, abs=gpu.SHORTEST)
    again, worker, _ = ten_minutes(results, QUICK | {"tune": FOREVER})  # no time needs to be reserved
    ((name, seconds),) = again.ran
    assert (name, seconds) == ("tune", gpu.TUNE_SHARE * (600 - gpu.RESERVE))
    assert not set(ANCHOR_CELLS) & {cell for cell, _ in worker.asked}


def test_the_tuner_can_have_three_minutes_beside_the_anchors(tmp_path: Path) -> None:
    """Three minutes are enough for readings of the whole grid (tests/test_tune_budget.py)."""
    results = results_in(tmp_path)
    commands, _, _ = ten_minutes(results, {"tune": FOREVER}, tests_share=0.0, tune_share=0.66)
    ((name, seconds),) = commands.ran
    assert name == "tune"
    assert 180 < seconds - gpu.TUNE_GRACE < 185
    assert set(ANCHORS) <= results.rows.keys()


def test_kernels_of_the_anchors_are_compiled_first(tmp_path: Path) -> None:
    _, worker, _ = ten_minutes(results_in(tmp_path), QUICK)
    anchors, rest = worker.compiled
    assert anchors == list(dict.fromkeys(cell.problem for cell in ANCHOR_CELLS if cell.phase != "warmup"))
    reached = {cell.problem for cell, _ in worker.asked if not cell.anchor}
    assert rest
    assert len(rest) == len(set(rest))
    assert set(rest) <= reached  # no kernel is compiled long before its row


@pytest.mark.parametrize("ahead", [5.0, FOREVER])
def test_every_anchor_has_its_share_of_time_and_keeps_partial_readings(ahead: float, tmp_path: Path) -> None:
    """This holds even if compiling ahead and the ceilings hang."""
    results = results_in(tmp_path)
    _, worker, _ = ten_minutes(results, dict.fromkeys(QUICK, FOREVER), usual=FOREVER, ahead=ahead)
    parts = [seconds for _, seconds in worker.asked[: len(ANCHORS)]]
    assert min(parts) == pytest.approx(max(parts))
    assert min(parts) > 20
    partial = [row.measured for row in (results.rows[name] for name in ANCHORS) if isinstance(row, FailedRow)]
    assert partial == [network_row(cell) for cell in ANCHOR_CELLS]
    assert results.todo(ANCHOR_CELLS) == ANCHOR_CELLS
    _, worker, _ = ten_minutes(results, QUICK, usual=40.0)  # more than an anchor's share, but it fits
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


def test_a_broken_file_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "nvidia_h200.json").write_text('{"machine": [')
    assert "renamed it to" in str(results_in(tmp_path).note)


def scripted(cell: Cell, device: str, report: Callable[[CellRow], None]) -> CellRow:
    """Act in the worker as the cell's activation says."""
    report(network_row(cell))
    if cell.problem.activation == "die":
        os._exit(3)
    if cell.problem.activation == "hang":
        time.sleep(600)
    if cell.problem.activation == "raise":
        raise ValueError("no such thing")
    return network_row(cell, device=device)


def note_problems(problems: list[Problem]) -> None:
    """Record the problems in the worker instead of compiling."""
    print("compiled:", *problems, flush=True)


def worker_pid(worker: gpu.MeasuringWorker) -> int:
    assert worker.worker is not None
    assert worker.worker.process.pid is not None
    return worker.worker.process.pid


def test_a_worker_survives_failing_rows(tmp_path: Path) -> None:
    def cell(activation: str) -> Cell:
        return Cell("odd", Problem((1, 1), 1, activation=activation), "forward")

    worker = gpu.MeasuringWorker(tmp_path / "worker.log", "cpu", scripted, note_problems)
    try:
        assert worker.measure(cell("relu"), 120) == network_row(cell("relu"), device="cpu")
        first = worker_pid(worker)
        worker.compile_ahead([cell("relu").problem], 120)
        assert f"compiled: {cell('relu').problem}" in (tmp_path / "worker.log").read_text()
        with pytest.raises(gpu.RowError, match="ValueError: no such thing") as failure:
            worker.measure(cell("raise"), 120)
        assert failure.value.partial == network_row(cell("raise"))
        assert worker_pid(worker) == first
        with pytest.raises(gpu.RowError, match="ended with status 3"):
            worker.measure(cell("die"), 120)
        worker.measure(cell("relu"), 120)
        second = worker_pid(worker)
        assert second != first
        with pytest.raises(gpu.CutOffError, match="stopped after 1 s") as cut_off:
            worker.measure(cell("hang"), 1)
        assert cut_off.value.partial == network_row(cell("hang"))
        assert worker.worker is None
        with pytest.raises(ProcessLookupError):
            os.kill(second, 0)
    finally:
        worker.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let children handle SIGINT even if this process runs in a shell's background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("stubborn", "summary"), [(False, "said at the end"), (True, "begun")])
@pytest.mark.usefixtures("interruptible")
def test_a_child_out_of_time_may_write_and_is_killed_after_its_grace_period(
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
    for file in ("conftest.py", "interpreter.py"):
        shutil.copy(ROOT / "tests" / file, tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    alone\n    quick\n")
    (tests / "test_some.py").write_text(GPU_TESTS.format(mark="quick", seconds=600))
    gpu.run_tests(results, tmp_path, tmp_path, seconds=gpu.GRACE + 2)
    assert results.content["tests"]["finished"] is False
    assert results.content["tests"]["summary"].endswith("; not started")
    for log in ("tests.log", "failures.txt"):
        assert "assert (1 + 1) == 3" in (tmp_path / log).read_text()
    (tests / "test_some.py").write_text(GPU_TESTS.format(mark="alone", seconds=0))
    gpu.run_tests(results, tmp_path, tmp_path, seconds=120)
    actual = json.loads(results.path.read_text())["tests"]
    assert (actual["finished"], actual["status"]) == (True, 1)
    assert re.search("1 failed.*; 1 passed", actual["summary"])
    assert (tmp_path / "failures.txt").read_text().count("test_wrong (call)") == 1  # only failures of this run


TUNER = """
import argparse, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["tune"])
parser.add_argument("--minutes", type=float, required=True)
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--readings", type=pathlib.Path, required=True)
options = parser.parse_args()
again = options.out.exists() and options.readings.exists()
options.out.write_text("{}")
options.readings.write_text("{}")
print("carried on" if again else "begun", options.minutes)
"""


def test_the_tuner_has_a_share_of_the_time_and_may_fail(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    (tmp_path / "mlp_fused").mkdir()
    (tmp_path / "mlp_fused" / "__init__.py").touch()  # otherwise a package in PYTHONPATH would run
    script = tmp_path / "mlp_fused" / "__main__.py"

    def tune(source: str, seconds: float = 60) -> dict[str, Any]:
        script.write_text(source)
        gpu.run_tuner(results, tmp_path, tmp_path, seconds)
        return json.loads(results.path.read_text())["tune"]

    refused = tune("import sys; sys.exit('tune: there is no such command')")
    assert (refused["finished"], refused["status"], refused["file"]) == (True, 1, None)
    assert refused["readings"] is None
    assert gpu.ending(refused).startswith("tune: there is no such command (")
    actual = tune(TUNER)
    assert (actual["status"], actual["summary"]) == (0, "begun 0.75")  # minutes; the rest is the grace period
    assert (actual["file"], actual["readings"]) == ("tuned_nvidia_h200.json", "readings_nvidia_h200.json")
    assert tune(TUNER)["summary"] == "carried on 0.75"
    slow = tune(TUNER + "time.sleep(600)", seconds=2)
    assert (slow["finished"], slow["status"]) == (False, None)
    assert "cut off" in gpu.ending(slow)


def test_one_command_runs_tests_tuner_and_rows_and_ends_with_the_goals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    class Worker:
        def __init__(self, log: Path) -> None: ...

        def measure(self, cell: Cell, seconds: float) -> CellRow:
            ran.append(str(cell))
            return network_row(cell, 1.25)

        def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
            ran.append("compile")

        def ceilings(self, seconds: float) -> dict[str, Any]:
            ran.append("ceilings")
            return {}

        def close(self) -> None: ...

    def run_module(command: list[str], root: Path, log: Path, seconds: float, grace: float) -> dict[str, Any]:
        ran.append(" ".join(command[:2]))
        return {"finished": True, "status": 2 * (command[0] == "mlp_fused"), "summary": "done", "seconds": 1.0}

    def command(*arguments: str) -> int:
        given = ["--out", str(tmp_path), "--cells", "seed-*-step", *arguments]
        return gpu.main(given, refusal=lambda: None, machine=lambda: MACHINE, worker=Worker, run=run_module)

    steps = [str(cell) for cell in select("seed-*-step")]
    assert command() == 0  # a failure of the tuner is not one of a row
    assert ran == ["pytest -m", "pytest -m", "mlp_fused tune", "ceilings", "compile", steps[0], "compile", *steps[1:]]
    messages = capsys.readouterr().out
    assert "tuner: done (" in messages
    assert f"seed: {len(steps)} of {len(steps)} rows run on our kernels" in messages
    assert "missed        ≥ 1.3    1.250" in messages
    ran.clear()
    assert command() == 0
    assert ran == ["mlp_fused tune"]
    assert command("--tune-share", "0") == 0
    assert ran == ["mlp_fused tune"]


def test_without_a_gpu_it_prints_one_sentence_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("nothing was measured: no CUDA device")
    assert gpu.main(["--out", str(tmp_path), "--cells", "nothing"]) == 2
    assert not list(tmp_path.iterdir())


def test_a_refusal_prints_one_sentence_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)], refusal=lambda: "the moon is full") == 2
    assert capsys.readouterr().err == "nothing was measured: the moon is full\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("switch", DISTORTING)
def test_a_distorting_switch_is_refused(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in DISTORTING:
        monkeypatch.delenv(name, raising=False)
    assert gpu.why_nothing_runs() is None
    monkeypatch.setenv(switch, "1")
    assert str(gpu.why_nothing_runs()).startswith(f"{switch} is set")
