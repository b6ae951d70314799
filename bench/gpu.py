"""Run everything that needs a GPU, in one command: `python bench/gpu.py --minutes 10 --out DIR`.

It runs the GPU tests, the tuner, the anchor cells, and then the rest of the grid until the time is up. At the end it
prints the report on the goals (goals.py) for all rows so far. Called again with the same DIR, it continues: finished
tests and measured rows are not run again, and the tuner adds to its table, beginning with problems that are not in it.
Rows are measured with the tiles of the package, not with those of this tuning run, because new files in kernels/tuned/
would be another version of the sources.

**Time.** ANCHOR_RESERVE seconds are reserved for every anchor that has no row yet, so that anchors get rows however
long tests and tuner take. With `--minutes 10`, about 300 seconds remain: up to 240 for the tests, then half of the rest
for the tuner. With 5 minutes or less, nothing remains, and tests and tuner are left for a later call. With
`--minutes 10 --tests-share 0 --tune-share 0.66` the tuner has three minutes. According to a model of its time on 16
cores (test_tune_budget.py), every problem of the grid then has readings, and the anchors have one of every tile.

The time for anchors is divided equally among those still to come. If an anchor takes longer, the part that was measured
is stored, and the anchor is measured again before the rest of the grid. Once all anchors have rows, nothing is
reserved: with `--minutes 8 --tests-share 0 --tune-share 0.75` the tuner then has 337 seconds. According to the same
model, it then measures every tile of the anchors, three or four of all other products, and every network.

The tests run in two commands, `pytest -m 'gpu and not alone' -n auto` and `pytest -m 'gpu and alone'`. When their time
is up, tests and tuner get SIGINT, so that they print their results, and a few seconds later SIGKILL. Before rows are
timed, their kernels are compiled on all cores but two.

**Files.** DIR then has tests.log, tests_alone.log, failures.txt (every failed test, written when it fails), tune.log,
worker.log, tuned_<gpu>.json, readings_<gpu>.json (the times of all tiles and paths that the tuner measured, for
`python -m bench.fit`) and <gpu>.json, which goes to bench/results/. <gpu> is the name of the device by
`mlp_fused.kernels.devices.device_slug`. The file <gpu>.json is written after every row, atomically:

    schema      3
    machine     GPU, driver, versions, CPU, digests of the sources and of the user's own table (see machine.py)
    started, updated    UTC, ISO 8601
    tests       {"finished", "status", "summary", "seconds"} of both test commands, or null. The summary is the last
                line of each output. The status is the larger of the two, or null if their time was up
    tune        the same for the last run of `mlp-fused tune`, and the names of its "file" and "readings"; or null
    ceilings    one entry for each call: date, FLOP/s by dtype, bytes/s of a copy on the device
    rows        by id, in the order of measurement (see rows.py)

If DIR already has a file of another GPU, other versions, sources or user's table, it is renamed to include its date,
and a new file is started.

**Failures.** A worker process does the measuring. If a row fails, hangs or breaks the CUDA context, its error is
recorded, the worker is restarted if necessary, and the next row runs. A failure of the tuner does not stop the run
either. Exit status: 0; 1 if a test or a row failed; 2 if there is nothing to run on; 130 after Ctrl-C.
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
    BEGIN = time.monotonic()  # importing torch takes seconds, which count
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

Outcome = dict[str, Any]  # the outcome of a command, or the ceilings
Measure = Callable[[Cell, str, Callable[[CellRow], None]], CellRow]
CompileAhead = Callable[[list[Problem]], None]
Job = Cell | list[Problem] | None  # measure a row, compile ahead, measure the ceilings
Run = Callable[[list[str], Path, Path, float, float], Outcome]

SCHEMA = 3
# Times in seconds, and shares of the remaining time
RESERVE = 10.0  # for the last write and the end of the worker
SHORTEST = 10.0  # the minimum time to begin a row
ROW_SECONDS = 90.0  # the limit of a row
ANCHOR_SECONDS = 240.0  # the limit of an anchor; max-autotune times many tiles for each product
ANCHOR_RESERVE = 32.5  # reserved for each anchor, enough for ours, eager and a CUDA graph of eager
TESTS_SHARE = 0.8  # of the time that is not reserved: 240 seconds of ten minutes
TUNE_SHARE = 0.5  # of the time that is not reserved and that the tests leave
GRACE = 20.0  # from SIGINT to SIGKILL; pytest-xdist waits 10 seconds for its workers before it prints the failures
TUNE_GRACE = 15.0  # from the tuner's own time limit to SIGKILL
TUNE_STOP = 5.0  # from SIGINT to SIGKILL of the tuner
PREPARE_SHARE = 0.2  # of the time for rows, at most, for the ceilings, and again for compiling ahead
USUAL_ROW = 10.0  # an estimate of a row's time, for the number of rows to compile ahead

# The arguments of `pytest`, by the name of the log.
TESTS = {"tests.log": ["-m", "gpu and not alone", "-n", "auto"], "tests_alone.log": ["-m", "gpu and alone"]}

# The parts of the machine's description that must agree for rows in one file.
SAME = ("gpu", "driver", "cuda", "torch", "triton", "python", "mlp_fused", "source", "user_table")


class RowError(Exception):
    """The measurement of a row failed. `partial` is the part that was measured before, or None."""

    def __init__(self, message: str, partial: CellRow | None = None) -> None:
        super().__init__(message)
        self.partial = partial


class CutOffError(RowError):
    """The measurement of a row exceeded its time limit."""


class Measurer(Protocol):
    """A process that measures.

    The first three methods raise CutOffError after `seconds`, and RowError if the measurement fails.
    """

    def measure(self, cell: Cell, seconds: float) -> CellRow:
        """Measure the row of a cell."""

    def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
        """Compile the kernels for the rows of these problems."""

    def ceilings(self, seconds: float) -> Outcome:
        """Measure the ceilings of the machine."""

    def close(self) -> None:
        """End the process and its child processes."""


class Results:
    """The results file. An existing file of the same machine is loaded; `save` writes it atomically."""

    def __init__(self, directory: Path, machine: dict[str, Any], slug: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{slug}.json"
        self.note: str | None = None  # a sentence about an old file that was renamed
        self.rows: dict[str, CellRow] = {}
        self.content = self._load(machine)

    def _load(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Return the content of the file without its rows, which go to `self.rows`. Start a new file if it differs."""
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
        renamed = self.path.with_name(f"{self.path.stem}.until-{date.replace(':', '')}.json")
        os.replace(self.path, renamed)
        self.note = (
            f"{self.path.name} has another {', '.join(differs)}; renamed it to {renamed.name}, started a new file"
        )
        return new

    def unfinished(self, cell: Cell) -> float:
        """Return the seconds after which a cell was stopped unfinished; 0 for any other cell."""
        row = self.rows.get(str(cell))
        return row.unfinished or 0.0 if isinstance(row, FailedRow) else 0.0

    def todo(self, cells: Iterable[Cell], *, retry: bool = False) -> list[Cell]:
        """Return the cells without a row or with an unfinished one. With `retry`, also those whose row failed."""
        return [
            cell
            for cell in cells
            if (row := self.rows.get(str(cell))) is None
            or self.unfinished(cell)
            or (retry and isinstance(row, FailedRow))
        ]

    def save(self) -> None:
        """Write the file atomically."""
        self.content["updated"] = now()
        rows = {name: to_json(row) for name, row in self.rows.items()}
        text = json.dumps({**self.content, "rows": rows}, indent=1)
        write_whole(self.path, lambda file: file.write(text.encode()))


def now() -> str:
    """Return the date and time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def serve(connection: Connection, function: Measure, ahead: CompileAhead, device: str, log: Path) -> None:
    """Run the worker until the pipe is closed: receive jobs, and send ("partial" | "done" | "error", answer).

    With an error it sends `broken`: True if the CUDA context is lost, so that nothing else can run in this process.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # a process group, so that the compilers that it starts end with it
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
    """True if all further CUDA calls fail, for example after an illegal memory access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def all_ceilings(device: str) -> Outcome:
    """Measure the ceilings of the machine: FLOP/s by dtype, and bytes/s of a copy."""
    by_dtype = {dtype: ceilings(device, dtype) for dtype in DTYPES}
    flops = {dtype: ceiling.flops_per_second for dtype, ceiling in by_dtype.items()}
    return {"date": now(), "flops_per_second": flops, "bytes_per_second": by_dtype["fp32"].bytes_per_second}


class MeasuringWorker:
    """A `Measurer` that measures one cell at a time in a process. After a failure, it starts a new process."""

    def __init__(
        self, log: Path, device: str = "cuda", function: Measure = measure, ahead: CompileAhead = compile_ahead
    ) -> None:
        self.log = log
        self.device = device
        self.function = function
        self.ahead = ahead
        self.worker: Worker | None = None

    def measure(self, cell: Cell, seconds: float) -> CellRow:
        """Measure the row of a cell."""
        row: CellRow = self._do(cell, seconds)
        return row

    def compile_ahead(self, problems: list[Problem], seconds: float) -> None:
        """Compile the kernels for the rows of these problems."""
        self._do(problems, seconds)

    def ceilings(self, seconds: float) -> Outcome:
        """Measure the ceilings of the machine."""
        outcome: Outcome = self._do(None, seconds)
        return outcome

    def _do(self, job: Job, seconds: float) -> Any:
        """Send a job and return the answer. Raises CutOffError after `seconds`, RowError if the job fails."""
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
            raise RowError(f"the measuring process ended with status {status}", partial) from None
        self.close()
        raise CutOffError(f"stopped after {seconds:.0f} s", partial)

    def _running(self) -> Worker:
        """Return the process. Start it if it does not run."""
        if self.worker is None or not self.worker.process.is_alive():
            self.close()
            self.worker = Worker(serve, self.function, self.ahead, self.device, self.log)
        return self.worker

    def close(self) -> None:
        """End the process and its child processes."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None


def run_module(command: list[str], root: Path, log: Path, seconds: float, grace: float = GRACE) -> Outcome:
    """Run `python -m command` in a child process for at most `seconds`.

    The process gets SIGINT `grace` seconds before the end, or after half the time if that is later. At the end, its
    process group gets SIGKILL.

    Returns:
        {"finished", "status", "summary", "seconds"}; the summary is the last line of its output.
    """
    begin = time.monotonic()
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
        "seconds": round(time.monotonic() - begin, 1),
    }


def stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """Send SIGINT to a process, and SIGKILL to its process group after `grace` seconds."""
    child.send_signal(signal.SIGINT)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_tests(results: Results, directory: Path, root: Path, seconds: float, run: Run = run_module) -> None:
    """Run the GPU tests in two child processes, one after the other, for at most `seconds` together."""
    failures = directory.resolve() / "failures.txt"
    failures.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    for log, options in TESTS.items():
        left = seconds - sum(outcome["seconds"] for outcome in outcomes)
        if left <= GRACE:
            outcomes.append({"finished": False, "status": None, "summary": "not started", "seconds": 0.0})
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
    """Run `python -m mlp_fused tune` in a child process for at most `seconds`. Its output goes to tune.log."""
    files = {name: directory.resolve() / f"{name}_{results.path.stem}.json" for name in ("tuned", "readings")}
    minutes = max(0.0, seconds - TUNE_GRACE) / 60
    command = ["mlp_fused", "tune", "--minutes", f"{minutes:.2f}"]
    command += ["--out", str(files["tuned"]), "--readings", str(files["readings"])]
    outcome = run(command, root, directory / "tune.log", seconds, TUNE_STOP)
    written = {name: file.name if file.exists() else None for name, file in files.items()}
    results.content["tune"] = {**outcome, "file": written["tuned"], "readings": written["readings"]}
    results.save()


@dataclass(frozen=True)
class Plan:
    """The order and the time limits of the work.

    Attributes:
        results: the results file.
        directory: the folder of all files.
        worker: the process that measures.
        deadline: the end, by `clock`.
        run: the function that runs the tests and the tuner.
        clock: a clock in seconds.
        say: called with each line of progress.
    """

    results: Results
    directory: Path
    worker: Measurer
    deadline: float
    run: Run = run_module
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - self.clock()

    def tests_and_tuner(self, anchors: int, tests_share: float, tune_share: float) -> None:
        """Run the tests, unless an earlier call finished them, and the tuner, in the time not reserved for anchors."""
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
        """Measure the ceilings and the rows of these cells: anchors, then unfinished anchors again, then the rest."""
        try:
            self.results.content["ceilings"].append(self.worker.ceilings(max(1.0, PREPARE_SHARE * self.left)))
            self.results.save()
        except RowError as error:
            self.say(f"cannot measure the ceilings: {error}")
        anchors = [cell for cell in todo if cell.anchor]
        self.compile(anchors)
        self.run_rows(anchors)
        rest = [cell for cell in todo if not cell.anchor or self.results.unfinished(cell)]
        self.compile(rest[: max(0, int(self.left / USUAL_ROW))])
        self.run_rows(rest)

    def compile(self, cells: Iterable[Cell]) -> None:
        """Compile the kernels of these cells ahead, except for cells that measure compiling."""
        problems = list(dict.fromkeys(cell.problem for cell in cells if cell.phase not in FRESH_PHASES))
        begin, seconds = self.clock(), PREPARE_SHARE * self.left
        if not problems or seconds < SHORTEST:
            return
        try:
            self.worker.compile_ahead(problems, seconds)
        except RowError as error:
            self.say(f"kernels are compiled at their launch, because compiling ahead failed: {error}")
        else:
            self.say(f"compiled the kernels of {len(problems)} problems in {self.clock() - begin:.1f} s")

    def run_rows(self, cells: Sequence[Cell]) -> int:
        """Measure cells in order until the deadline. Write and report each row. Return the number of written rows.

        The remaining time is divided equally among this cell and the later anchors without a row. A row that is stopped
        by the deadline is unfinished and will be measured again. A row that is stopped by its own limit has failed.
        """
        done = 0
        for number, cell in enumerate(cells):
            begin, left = self.clock(), self.left
            if left < SHORTEST:
                break
            waiting = sum(later.anchor and str(later) not in self.results.rows for later in cells[number + 1 :])
            seconds = left / (1 + waiting)
            if seconds <= self.results.unfinished(cell):
                continue  # it would not get further than before
            row = self.row(cell, seconds)
            spent = self.clock() - begin
            self.results.rows[str(cell)] = replace(row, seconds_spent=round(spent, 2))
            self.results.save()
            done += 1
            times = f"{spent:.1f} s, {max(0.0, self.left):.0f} s left"
            self.say(f"[{number + 1}/{len(cells)}] {cell}: {summary(row)} ({times})")
        return done

    def row(self, cell: Cell, seconds: float) -> CellRow:
        """Measure a cell within its own limit and `seconds`. If it fails, return a FailedRow with the measured part."""
        limit = ANCHOR_SECONDS if cell.anchor else ROW_SECONDS
        try:
            return self.worker.measure(cell, min(limit, seconds))
        except RowError as error:
            unfinished = round(seconds, 1) if isinstance(error, CutOffError) and seconds < limit else None
            return FailedRow.for_cell(cell, "cuda", error=str(error), unfinished=unfinished, measured=error.partial)


def summary(row: CellRow) -> str:
    """Return a row in half a line."""
    if isinstance(row, FailedRow):
        return f"{'failed' if row.unfinished is None else 'unfinished'}: {row.error}"
    if isinstance(row, TimedRow):
        speeds = [f"{baseline.speedup:.2f}x {name}" for name, baseline in row.baselines.items()]
        speeds += [f"{name} failed" for name in row.failures]
        timing, floor = row.ours.timing, row.ours.floor
        return f"{row.how}, {timing.ms:.4g} ms, {floor.ratio:.2f} of the floor, {', '.join(speeds)}"
    if isinstance(row, CopyRow):
        pinned, prefetched = row.copies["pinned"], row.throughput.ways["prefetched"]
        ratios = (f"{pinned.ms / part.timing.kernel_ms:.2f} {phase}" for phase, part in row.phases.items())
        loop = f"prefetched {prefetched.examples_per_s:.3g} examples/s, {prefetched.bound_share:.2f} of the bound"
        return f"pinned {pinned.ms:.4g} ms = {', '.join(ratios)} of the kernels; {loop}"
    assert isinstance(row, FreshRow)
    return json.dumps(row.seconds)


def why_nothing_runs() -> str | None:
    """Return the reason not to measure on this machine; None if it can be measured."""
    return why_not(GRID[0], "cuda") or distorted()


def main(
    arguments: list[str] | None = None,
    begin: float | None = None,
    *,
    refusal: Callable[[], str | None] = why_nothing_runs,
    machine: Callable[[], dict[str, Any]] = machine,
    worker: Callable[[Path], Measurer] = MeasuringWorker,
    run: Run = run_module,
) -> int:
    """Run the command line, and return the exit status.

    Args:
        arguments: the arguments; by default those of `sys.argv`.
        begin: the time at which the minutes begin, by time.monotonic(); by default now.
        refusal: a function that returns the reason not to measure, or None.
        machine: a function that describes the machine.
        worker: a function that starts the measuring process, with its log.
        run: the function that runs the tests and the tuner.
    """
    begin = time.monotonic() if begin is None else begin
    parser = argparse.ArgumentParser(description="run GPU tests and benchmarks within a time limit")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: 10)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files, new or old")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help='ids of the rows, such as "narrow-*-forward"')
    share = "share of the time not reserved for anchors"
    parser.add_argument("--tests-share", type=float, default=TESTS_SHARE, help=f"{share}, for the tests (0: no tests)")
    parser.add_argument(
        "--tune-share", type=float, default=TUNE_SHARE, help="share of the rest, for the tuner (0: none)"
    )
    parser.add_argument("--retry", action="store_true", help="measure failed rows again")
    options = parser.parse_args(arguments)

    try:
        cells = select(options.cells)
    except ValueError as error:
        return refuse(str(error))
    if reason := refusal():
        return refuse(reason)
    description = machine()
    results = Results(options.out, description, device_slug(description["gpu"]))
    if results.note:
        print(results.note, flush=True)
    results.save()

    def say(line: str) -> None:
        print(line, flush=True)

    measurer = worker(options.out / "worker.log")
    plan = Plan(results, options.out, measurer, begin + 60 * options.minutes - RESERVE, run=run, say=say)
    try:
        todo = results.todo(cells, retry=options.retry)
        anchors = sum(cell.anchor for cell in todo)
        plan.tests_and_tuner(anchors, options.tests_share, options.tune_share)
        say(f"{len(cells) - len(todo)} rows are measured, {len(todo)} remain, {plan.left:.0f} s left")
        if todo:
            plan.measure(todo)
    except KeyboardInterrupt:
        say("interrupted; the measured rows are written")
        return 130
    finally:
        measurer.close()
    failures = [row for row in results.rows.values() if isinstance(row, FailedRow)]
    unfinished = sum(row.unfinished is not None for row in failures)
    failed = len(failures) - unfinished
    say(f"{len(results.rows)} rows in {results.path}: {failed} failed, {unfinished} unfinished")
    for line in goals.report(results.rows.values()):
        say(line)
    tests = results.content["tests"]
    return 1 if failed or (tests and tests["status"]) else 0


def ending(outcome: Outcome) -> str:
    """Return a line about the outcome of the tests or of the tuner."""
    status = f"status {outcome['status']}" if outcome["finished"] else "cut off"
    return f"{outcome['summary']} ({outcome['seconds']} s, {status})"


def refuse(reason: str) -> int:
    """Print the reason not to measure, and return the exit status."""
    print(f"nothing was measured: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(begin=BEGIN))
