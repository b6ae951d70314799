"""Everything a GPU is needed for, in one command: `python bench/gpu.py --minutes 10 --out DIR`.

Runs the GPU tests, then the tuner, then the anchor cells, then the rest of the grid until the time is up, and says what
all rows so far show of the goals (goals.py). Called again with the same DIR it carries on where it stopped: tests that
were finished and rows that are there are not run again; the tuner is given its file again, and begins with what is not
in it. The rows are measured with the tiles that the package comes with, not with those just tuned: in kernels/tuned/
these are another state of the sources.

The plan reserves ANCHOR_RESERVE seconds for every anchor that is still to be measured, so that the anchors have rows
however long tests and tuner take. Ten minutes leave about 300 seconds beside them: up to 240 for the tests, then half
of what those leave for the tuner; five minutes or less leave none, and tests and tuner wait for a later call. With
`--minutes 10 --tests-share 0 --tune-share 0.66` the tuner has three minutes: by a model of its time on 16 cores
(test_tune_budget.py), every problem of the grid then has readings, and the anchors one of every tile. An anchor
gets an equal part of the time left for the anchors still to come. One that takes longer is kept as far as it was
measured, and measured again before the rest of the grid. Once the anchors have rows, nothing is reserved: with
`--minutes 8 --tests-share 0 --tune-share 0.75` the tuner then has 337 seconds, in which by a model of its time
(test_tune_budget.py) it measures every tile of the anchors, three or four of all other products, and every network.

The tests run in two commands, `pytest -m 'gpu and not alone' -n auto` and `pytest -m 'gpu and alone'`. Tests and tuner
that run out of time get SIGINT, so that they say what they found, and a few seconds later SIGKILL. Before rows are
timed, their kernels are compiled on all cores but two.

DIR then holds tests.log, tests_alone.log, failures.txt (every failed test, written the moment that it fails), tune.log,
worker.log, tuned_<gpu>.json, readings_<gpu>.json (the time of every tile and path that the tuner measured, for
`python -m bench.fit`) and <gpu>.json, which goes to bench/results/; <gpu> is the device's name by
`mlp_fused.kernels.devices.device_slug`. The last file is written after every row, whole or not at all:

    schema      3
    machine     see machine.py: GPU, driver, versions, CPU, digests of the sources and of the user's own table
    started, updated    UTC, ISO 8601
    tests       {"finished", "status", "summary", "seconds"} of both test commands, or null; the summary is the last
                line of each one's output, the status the larger of the two, null where their time was up
    tune        the same of `python -m mlp_fused tune`, the last time that it ran, and the names of its "file" and its
                "readings"; or null
    ceilings    one entry a call: date, FLOP/s by dtype, bytes/s of a copy on the device
    rows        by id, in the order measured: see rows.py

Where GPU, versions, sources or the user's own table are not those of a file already there, that file is put aside under
its date and a new one is started: numbers of two machines do not mix.

A worker process does the measuring. A row that fails, hangs or breaks the CUDA context is recorded with its error, the
worker is started afresh where it has to be, and the next row runs. So does everything after a tuner that fails. Exit
status: 0; 1 where a test or a row failed; 2 where there is nothing to run on; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

if __name__ in ("__main__", "__mp_main__"):
    BEGUN = time.monotonic()  # importing torch takes seconds of the user's time
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import goals
from bench.machine import ROOT, machine
from bench.measure import compile_ahead, describe, measure, why_not
from bench.problem import FRESH_PHASES, GRID, Cell, Problem, select
from bench.rows import CellRow, CopyRow, FailedRow, FreshRow, TimedRow, from_json, to_json
from mlp_fused.dtypes import DTYPES
from mlp_fused.environment import distorted
from mlp_fused.files import write_whole
from mlp_fused.kernels.devices import device_slug
from mlp_fused.processes import Worker
from mlp_fused.timing import ceilings

Outcome = dict[str, Any]  # what became of a command, or the ceilings
Measure = Callable[[Cell, str, Callable[[CellRow], None]], CellRow]
CompileAhead = Callable[[list[Problem]], None]
Job = Cell | list[Problem] | None  # measure a row, compile ahead, measure the ceilings
Run = Callable[[list[str], Path, Path, float, float], Outcome]

SCHEMA = 3
RESERVE = 10.0  # seconds kept for ending: the last write, the worker's end
SHORTEST = 10.0  # with less than this left, no row is begun
ROW_SECONDS = 90.0
ANCHOR_SECONDS = 240.0  # max-autotune times many tiles for each product
ANCHOR_RESERVE = 32.5  # for each anchor: enough for ours, eager and a graph of it
TESTS_SHARE = 0.8  # of what is not reserved: 240 seconds of ten minutes
TUNE_SHARE = 0.5  # of what is not reserved and the tests leave
GRACE = 20.0  # seconds from SIGINT to SIGKILL; pytest-xdist gives its workers 10 before it prints the failures
TUNE_GRACE = 15.0  # seconds between the end that the tuner is told and the one that it is given
TUNE_STOP = 5.0  # of those, from SIGINT to SIGKILL
PREPARE_SHARE = 0.2  # of the time left for rows, at most, for the ceilings, and for compiling kernels ahead
USUAL_ROW = 10.0  # seconds, by which is estimated how many rows will be reached

# What `pytest` is told, by the log that its output goes to.
TESTS = {"tests.log": ["-m", "gpu and not alone", "-n", "auto"], "tests_alone.log": ["-m", "gpu and alone"]}

# What must agree for rows to stand in one file.
SAME = ("gpu", "driver", "cuda", "torch", "triton", "python", "mlp_fused", "source", "user_table")


class RowError(Exception):
    """A row did not come back; `partial` is what had been measured of it."""

    def __init__(self, message: str, partial: CellRow | None = None) -> None:
        super().__init__(message)
        self.partial = partial


class CutOffError(RowError):
    """A row took longer than it was given."""


class Measurer(Protocol):
    """A process that measures: each method raises CutOffError after `seconds`, RowError where it fails."""

    def measure(self, cell: Cell, seconds: float) -> CellRow:
        """The row of a cell."""

    def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
        """Compile what the rows of these problems launch."""

    def ceilings(self, seconds: float) -> Outcome:
        """The machine's ceilings."""

    def close(self) -> None:
        """End the process and what it started."""


class Results:
    """The results file: loaded if it is of this machine, written whole after every change."""

    def __init__(self, directory: Path, machine: dict[str, Any], slug: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{slug}.json"
        self.note: str | None = None  # what became of an older file
        self.rows: dict[str, CellRow] = {}
        self.content = self._load(machine)

    def _load(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The file's content without the rows, which go to `self.rows`; that of a new file where it is unfit."""
        new = {
            "schema": SCHEMA,
            "machine": machine,
            "started": now(),
            "updated": now(),
            "tests": None,
            "tune": None,
            "ceilings": [],
        }
        if not self.path.exists():
            return new
        try:
            old: dict[str, Any] = json.loads(self.path.read_text())
            differs = [name for name in SAME if old["machine"].get(name) != machine.get(name)]
            if old["schema"] != SCHEMA:
                differs.append("schema")
            date = old["updated"]
            rows: Any = {name: from_json(row) for name, row in old.pop("rows").items()} if not differs else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            differs, date = ["content"], now()
        if not differs:
            self.rows = rows
            return old
        aside = self.path.with_name(f"{self.path.stem}.until-{date.replace(':', '')}.json")
        os.replace(self.path, aside)
        self.note = f"{self.path.name} has another {', '.join(differs)}: put aside as {aside.name}, a new file begins"
        return new

    def unfinished(self, cell: Cell) -> float:
        """The seconds that a cell was given and that were too few; 0 for any other."""
        row = self.rows.get(str(cell))
        return row.unfinished or 0.0 if isinstance(row, FailedRow) else 0.0

    def todo(self, cells: Iterable[Cell], *, retry: bool = False) -> list[Cell]:
        """The cells that have no row yet, or an unfinished one; with `retry`, also those whose row is an error."""
        return [
            cell
            for cell in cells
            if (row := self.rows.get(str(cell))) is None
            or self.unfinished(cell)
            or (retry and isinstance(row, FailedRow))
        ]

    def save(self) -> None:
        self.content["updated"] = now()
        rows = {name: to_json(row) for name, row in self.rows.items()}
        text = json.dumps({**self.content, "rows": rows}, indent=1)
        write_whole(self.path, lambda file: file.write(text.encode()))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def serve(connection: Connection, function: Measure, ahead: CompileAhead, device: str, log: Path) -> None:
    """The worker: receives jobs, sends ("partial" | "done" | "error", answer). Ends when the other side does.

    An error is sent with `broken`: whether the CUDA context is lost, so that nothing else can run in this process.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # so that it ends together with the compilers it starts
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        try:
            if job is None:
                connection.send(("done", all_ceilings(device)))
            elif isinstance(job, list):
                ahead(job)
                connection.send(("done", None))
            else:
                connection.send(("done", function(job, device, lambda row: connection.send(("partial", row)))))
        except Exception as error:
            connection.send(("error", {"error": describe(error), "broken": device == "cuda" and context_is_lost()}))


def context_is_lost() -> bool:
    """True if every CUDA call fails from now on, as after an illegal memory access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def all_ceilings(device: str) -> Outcome:
    """The machine's ceilings: FLOP/s by dtype, bytes/s of a copy."""
    found = {dtype: ceilings(device, dtype) for dtype in DTYPES}
    flops = {dtype: ceiling.flops_per_second for dtype, ceiling in found.items()}
    return {"date": now(), "flops_per_second": flops, "bytes_per_second": found["fp32"].bytes_per_second}


class MeasuringWorker:
    """Measures one cell at a time in a process, which is started again after it had to be ended."""

    def __init__(
        self, log: Path, device: str = "cuda", function: Measure = measure, ahead: CompileAhead = compile_ahead
    ) -> None:
        self.log = log
        self.device = device
        self.function = function
        self.ahead = ahead
        self.worker: Worker | None = None

    def measure(self, cell: Cell, seconds: float) -> CellRow:
        row: CellRow = self._do(cell, seconds)
        return row

    def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
        self._do(problems, seconds)

    def ceilings(self, seconds: float) -> Outcome:
        outcome: Outcome = self._do(None, seconds)
        return outcome

    def _do(self, job: Job, seconds: float) -> Any:
        """The answer of the process. Raises CutOffError after `seconds`, RowError where the job raised or it died."""
        worker = self._running()
        partial: CellRow | None = None
        deadline = time.monotonic() + seconds
        try:
            worker.connection.send(job)
            while worker.connection.poll(max(0.0, deadline - time.monotonic())):
                kind, answer = worker.connection.recv()
                if kind == "done":
                    return answer
                if kind == "error":
                    if answer["broken"]:
                        self.close()
                    raise RowError(answer["error"], partial)
                partial = answer
        except (EOFError, OSError):
            worker.process.join(5)
            status = worker.process.exitcode
            self.close()
            raise RowError(f"the process that measured it ended with status {status}", partial) from None
        self.close()
        raise CutOffError(f"stopped after {seconds:.0f} s", partial)

    def _running(self) -> Worker:
        """The process, started if there is none."""
        if self.worker is None or not self.worker.process.is_alive():
            self.close()
            self.worker = Worker(serve, self.function, self.ahead, self.device, self.log)
        return self.worker

    def close(self) -> None:
        """End the process and what it started."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None


def run_module(command: list[str], root: Path, log: Path, seconds: float, grace: float = GRACE) -> Outcome:
    """`python -m` something in a child process, ended after `seconds`: {"finished", "status", "summary", "seconds"}.

    It gets SIGINT `grace` seconds before, or halfway where that is sooner; then its process group gets SIGKILL.
    """
    begun = time.monotonic()
    command = [sys.executable, "-m", *command]
    grace = min(grace, seconds / 2)
    status: int | None = None
    with log.open("w") as file:
        child = subprocess.Popen(command, cwd=root, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(seconds - grace)
        finally:
            if child.returncode is None:
                stop(child, grace)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "finished": status is not None,
        "status": status,
        "summary": lines[-1] if lines else "",
        "seconds": round(time.monotonic() - begun, 1),
    }


def stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """Ask a process to end by SIGINT, and after `grace` seconds kill its group, whatever it has started."""
    child.send_signal(signal.SIGINT)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_tests(results: Results, directory: Path, root: Path, seconds: float, run: Run = run_module) -> None:
    """The GPU tests in two child processes one after the other, both ended after `seconds`."""
    failures = directory.resolve() / "failures.txt"
    failures.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    for log, options in TESTS.items():
        left = seconds - sum(outcome["seconds"] for outcome in outcomes)
        if left <= GRACE:
            outcomes.append({"finished": False, "status": None, "summary": "not begun", "seconds": 0.0})
            continue
        command = ["pytest", *options, "-q", "--failures", str(failures), "tests"]
        outcomes.append(run(command, root, directory / log, left, GRACE))
    statuses = [outcome["status"] for outcome in outcomes]
    results.content["tests"] = {
        "finished": all(outcome["finished"] for outcome in outcomes),
        "status": None if None in statuses else max(statuses),
        "summary": "; ".join(outcome["summary"] for outcome in outcomes),
        "seconds": round(sum(outcome["seconds"] for outcome in outcomes), 1),
    }
    results.save()


def run_tuner(results: Results, directory: Path, root: Path, seconds: float, run: Run = run_module) -> None:
    """`python -m mlp_fused tune` in a child process, its output in tune.log, ended after `seconds`."""
    files = {name: directory.resolve() / f"{name}_{results.path.stem}.json" for name in ("tuned", "readings")}
    minutes = max(0.0, seconds - TUNE_GRACE) / 60
    command = ["mlp_fused", "tune", "--minutes", f"{minutes:.2f}"]
    command += ["--out", str(files["tuned"]), "--readings", str(files["readings"])]
    outcome = run(command, root, directory / "tune.log", seconds, TUNE_STOP)
    there = {name: file.name if file.exists() else None for name, file in files.items()}
    results.content["tune"] = {**outcome, "file": there["tuned"], "readings": there["readings"]}
    results.save()


@dataclass(frozen=True)
class Plan:
    """The order of the work and its times: what it writes to, what runs and measures, what tells the time."""

    results: Results
    directory: Path
    worker: Measurer
    deadline: float  # by `clock`
    run: Run = run_module
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print

    @property
    def left(self) -> float:
        return self.deadline - self.clock()

    def tests_and_tuner(self, anchors: int, tests_share: float, tune_share: float) -> None:
        """Run the tests, unless they were finished before, and the tuner, in the time not reserved for anchors."""
        reserved, content = ANCHOR_RESERVE * anchors, self.results.content
        seconds = tests_share * (self.left - reserved)
        if seconds > GRACE and not (content["tests"] and content["tests"]["finished"]):
            run_tests(self.results, self.directory, ROOT, seconds, self.run)
            self.say(f"tests: {ending(content['tests'])}")
        seconds = tune_share * (self.left - reserved)
        if seconds > 2 * TUNE_GRACE:
            run_tuner(self.results, self.directory, ROOT, seconds, self.run)
            self.say(f"tuner: {ending(content['tune'])}")

    def measure(self, todo: Sequence[Cell]) -> None:
        """Measure the ceilings and the rows of these cells: the anchors, those again that need more time, the rest."""
        try:
            self.results.content["ceilings"].append(self.worker.ceilings(max(1.0, PREPARE_SHARE * self.left)))
            self.results.save()
        except RowError as error:
            self.say(f"the ceilings could not be measured: {error}")
        anchors = [cell for cell in todo if cell.anchor]
        self.compile(anchors)
        self.run_rows(anchors)
        rest = [cell for cell in todo if not cell.anchor or self.results.unfinished(cell)]
        self.compile(rest[: max(0, int(self.left / USUAL_ROW))])
        self.run_rows(rest)

    def compile(self, cells: Iterable[Cell]) -> None:
        """Compile ahead what these cells launch, but for those that are about compiling."""
        problems = list(dict.fromkeys(cell.problem for cell in cells if cell.phase not in FRESH_PHASES))
        begun, seconds = self.clock(), PREPARE_SHARE * self.left
        if not problems or seconds < SHORTEST:
            return
        try:
            self.worker.compile_ahead(problems, seconds)
        except RowError as error:
            self.say(f"kernels are compiled where they are launched, as ahead it failed: {error}")
        else:
            self.say(f"the kernels of {len(problems)} problems were compiled in {self.clock() - begun:.1f} s")

    def run_rows(self, cells: Sequence[Cell]) -> int:
        """Measure cells in order until the deadline, writing and saying each row. Returns how many were written.

        A cell leaves the anchors after it that have no row their equal part of the time. A row that is cut off before
        its own limit is unfinished, and stays to do; one that its own limit cuts off is an error.
        """
        done = 0
        for number, cell in enumerate(cells):
            begun, left = self.clock(), self.left
            if left < SHORTEST:
                break
            waiting = sum(each.anchor and str(each) not in self.results.rows for each in cells[number + 1 :])
            seconds = left / (1 + waiting)
            if seconds <= self.results.unfinished(cell):
                continue  # it would get no further than before
            row = self.row(cell, seconds)
            spent = self.clock() - begun
            self.results.rows[str(cell)] = replace(row, seconds_spent=round(spent, 2))
            self.results.save()
            done += 1
            times = f"{spent:.1f} s, {max(0.0, self.left):.0f} s left"
            self.say(f"[{number + 1}/{len(cells)}] {cell}: {summary(row)} ({times})")
        return done

    def row(self, cell: Cell, seconds: float) -> CellRow:
        """A cell's row within its own limit or `seconds`; where measuring fails, the part measured before and why."""
        limit = ANCHOR_SECONDS if cell.anchor else ROW_SECONDS
        try:
            return self.worker.measure(cell, min(limit, seconds))
        except RowError as error:
            unfinished = round(seconds, 1) if isinstance(error, CutOffError) and seconds < limit else None
            return FailedRow.of(cell, "cuda", error=str(error), unfinished=unfinished, measured=error.partial)


def summary(row: CellRow) -> str:
    """A row in half a line."""
    if isinstance(row, FailedRow):
        return f"{'failed' if row.unfinished is None else 'unfinished'}: {row.error}"
    if isinstance(row, TimedRow):
        speeds = [f"{each.speedup:.2f}x {name}" for name, each in row.baselines.items()]
        speeds += [f"{name} failed" for name in row.failures]
        timing, floor = row.ours.timing, row.ours.floor
        return f"{row.how}, {timing.ms:.4g} ms, {floor.ratio:.2f} of the floor, {', '.join(speeds)}"
    if isinstance(row, CopyRow):
        pinned, ahead = row.copies["pinned"], row.throughput.ways["prefetched"]
        ratios = (f"{pinned.ms / part.timing.kernel_ms:.2f} {phase}" for phase, part in row.phases.items())
        moved = f"prefetched {ahead.examples_per_s:.3g} examples/s, {ahead.of_bound:.2f} of the bound"
        return f"pinned {pinned.ms:.4g} ms = {', '.join(ratios)} of the kernels; {moved}"
    assert isinstance(row, FreshRow)
    return json.dumps(row.seconds)


def why_nothing_runs() -> str | None:
    """The reason not to measure a GPU here; None where it is measured."""
    return why_not(GRID[0], "cuda") or distorted()


def main(
    arguments: list[str] | None = None,
    begun: float | None = None,
    *,
    refusal: Callable[[], str | None] = why_nothing_runs,
    machine: Callable[[], dict[str, Any]] = machine,
    worker: Callable[[Path], Measurer] = MeasuringWorker,
    run: Run = run_module,
) -> int:
    """Do what the command line asks for, and return the exit status.

    Args:
        begun: when the time began to count, by time.monotonic(); by default now.
        refusal: says why nothing can be measured, if so.
        machine: describes what is measured on.
        worker: starts what measures, with its log.
        run: runs the tests and the tuner.
    """
    begun = time.monotonic() if begun is None else begun
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks within a time limit")
    parser.add_argument("--minutes", type=float, default=10.0, help="ends before this many minutes (default 10)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go; carried on from")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help='ids to run, such as "narrow-*-forward"')
    shares = "part of the time not reserved for anchors"
    parser.add_argument("--tests-share", type=float, default=TESTS_SHARE, help=f"{shares} for tests (0: none)")
    parser.add_argument("--tune-share", type=float, default=TUNE_SHARE, help="then for the tuner (0: none)")
    parser.add_argument("--retry", action="store_true", help="run rows again that failed")
    options = parser.parse_args(arguments)

    try:
        cells = select(options.cells)
    except ValueError as error:
        return refuse(str(error))
    if reason := refusal():
        return refuse(reason)
    found = machine()
    results = Results(options.out, found, device_slug(found["gpu"]))
    if results.note:
        print(results.note, flush=True)
    results.save()

    def say(line: str) -> None:
        print(line, flush=True)

    measurer = worker(options.out / "worker.log")
    plan = Plan(results, options.out, measurer, begun + 60 * options.minutes - RESERVE, run=run, say=say)
    try:
        todo = results.todo(cells, retry=options.retry)
        anchors = sum(cell.anchor for cell in todo)
        plan.tests_and_tuner(anchors, options.tests_share, options.tune_share)
        say(f"{len(cells) - len(todo)} rows are there, {len(todo)} to go, {plan.left:.0f} s left")
        if todo:
            plan.measure(todo)
    except KeyboardInterrupt:
        say("interrupted; the rows so far are written")
        return 130
    finally:
        measurer.close()
    failures = [row for row in results.rows.values() if isinstance(row, FailedRow)]
    unfinished = sum(row.unfinished is not None for row in failures)
    failed = len(failures) - unfinished
    say(f"{len(results.rows)} rows in {results.path}, {failed} of them failed, {unfinished} unfinished")
    for line in goals.report(results.rows.values()):
        say(line)
    tests = results.content["tests"]
    return 1 if failed or (tests and tests["status"]) else 0


def ending(outcome: Outcome) -> str:
    """The end of the tests or of the tuner, in a line."""
    status = f"status {outcome['status']}" if outcome["finished"] else "cut off"
    return f"{outcome['summary']} ({outcome['seconds']} s, {status})"


def refuse(reason: str) -> int:
    print(f"nothing was measured: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
