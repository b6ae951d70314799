"""Everything a GPU is needed for, in one command: `python bench/gpu.py --minutes 8 --out DIR`.

Runs the GPU tests, then the tuner, then the anchor cells, then the rest of the grid until the time is up, and says what
all rows so far show of the goals (goals.py). Called again with the same DIR it carries on where it stopped: tests that
were finished and rows that are there are not run again; the tuner is given its file again, and begins with what is not
in it. With `--tests-share 0 --tune-share 0.75` it has 337 of 8 minutes' seconds, in which by a model of its time
(tests/test_tuning.py) it measures every tile of the anchors, three or four of all other products, and every network.
The rows are measured with the tiles that the package comes with, not with those just tuned: in kernels/tuned/ these are
another state of the sources.

DIR then holds tests.log, tune.log, worker.log, tuned_<gpu>.json and <gpu>.json, which goes to bench/results/; <gpu> is
the device's name by `mlp_fused.kernels.configs.device_slug`. That file is written after every row, whole or not at all:

    schema      2
    machine     see machine.py: GPU, driver, versions, CPU, digests of the sources and of the user's own table
    started, updated    UTC, ISO 8601
    tests       {"finished", "status", "summary", "seconds"} of `pytest -m gpu tests`, or null; the summary is the last
                line of its output, the status null where its time was up
    tune        the same of `python -m mlp_fused tune`, the last time that it ran, and its "file"; or null
    ceilings    one entry a call: date, FLOP/s by dtype, bytes/s of a copy on the device
    rows        by id, in the order measured: measure.py's row and its "seconds_spent"; or {"id", "error", …}

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
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import goals
from bench.machine import ROOT, machine
from bench.measure import describe, measure, why_not
from bench.shapes import GRID, Cell, select
from mlp_fused.environment import distorted
from mlp_fused.kernels.configs import device_slug
from mlp_fused.timing import ceilings
from mlp_fused.training import DTYPES

Row = dict[str, Any]
Measure = Callable[[Cell, str, Callable[[Row], None]], Row]

SCHEMA = 2
RESERVE = 10.0  # seconds kept for ending: the last write, the worker's end
SHORTEST = 10.0  # with less than this left, no row is begun
ROW_SECONDS = 90.0
ANCHOR_SECONDS = 240.0  # max-autotune times many tiles for each product
TESTS_SHARE = 0.35
TUNE_SHARE = 0.25
TUNE_GRACE = 15.0  # seconds between the end that the tuner is told and the one that it is given

# What must agree for rows to stand in one file.
SAME = ("gpu", "driver", "cuda", "torch", "triton", "python", "mlp_fused", "source", "user_table")


class RowError(Exception):
    """A row did not come back; `partial` is what had been measured of it."""

    def __init__(self, message: str, partial: Row | None = None) -> None:
        super().__init__(message)
        self.partial = partial or {}


class Measurer(Protocol):
    def measure(self, cell: Cell, seconds: float) -> Row:
        """The row of a cell. Raises TimeoutError or RowError."""


class Results:
    """The results file: loaded if it is of this machine, written whole after every change."""

    def __init__(self, directory: Path, machine: dict[str, Any], slug: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{slug}.json"
        self.note: str | None = None  # what became of an older file
        self.content = self._load(machine)

    def _load(self, machine: dict[str, Any]) -> dict[str, Any]:
        new = {
            "schema": SCHEMA,
            "machine": machine,
            "started": now(),
            "updated": now(),
            "tests": None,
            "tune": None,
            "ceilings": [],
            "rows": {},
        }
        if not self.path.exists():
            return new
        try:
            old = json.loads(self.path.read_text())
            differs = [name for name in SAME if old["machine"].get(name) != machine.get(name)]
            if old["schema"] != SCHEMA:
                differs.append("schema")
            date = old["updated"]
        except (ValueError, KeyError, TypeError, AttributeError):
            differs, date = ["content"], now()
        if not differs:
            return old
        aside = self.path.with_name(f"{self.path.stem}.until-{date.replace(':', '')}.json")
        os.replace(self.path, aside)
        self.note = f"{self.path.name} has another {', '.join(differs)}: put aside as {aside.name}, a new file begins"
        return new

    @property
    def rows(self) -> dict[str, Row]:
        return self.content["rows"]

    def todo(self, cells: Iterable[Cell], *, retry: bool = False) -> list[Cell]:
        """The cells that have no row yet; with `retry`, those too whose row is an error."""
        return [c for c in cells if str(c) not in self.rows or (retry and "error" in self.rows[str(c)])]

    def save(self) -> None:
        self.content["updated"] = now()
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(self.content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def serve(connection: Connection, function: Measure, device: str, log: Path) -> None:
    """The worker: receives cells, sends ("partial" | "row" | "error", dict). Ends when the other side does.

    An error is sent with `broken`: whether the CUDA context is lost, so that nothing else can run in this process.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # so that it ends together with the compilers it starts
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        try:
            if cell is None:
                connection.send(("row", all_ceilings(device)))
            else:
                connection.send(("row", function(cell, device, lambda row: connection.send(("partial", row)))))
        except Exception as error:
            connection.send(("error", {"error": describe(error), "broken": device == "cuda" and context_is_lost()}))


def context_is_lost() -> bool:
    """Whether CUDA fails at anything from now on, as it does after an illegal memory access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def all_ceilings(device: str) -> Row:
    """The machine's ceilings: FLOP/s by dtype, bytes/s of a copy."""
    found = {dtype: ceilings(device, dtype) for dtype in DTYPES}
    flops = {dtype: ceiling.flops_per_second for dtype, ceiling in found.items()}
    return {"date": now(), "flops_per_second": flops, "bytes_per_second": found["fp32"].bytes_per_second}


class Worker:
    """A process that measures one cell at a time, and is started again after it had to be ended."""

    def __init__(self, log: Path, device: str = "cuda", function: Measure = measure) -> None:
        self.log = log
        self.device = device
        self.function = function
        self.process: Any = None
        self.connection: Any = None

    def measure(self, cell: Cell | None, seconds: float) -> Row:
        """The row of a cell, or for None the machine's ceilings.

        Raises TimeoutError after `seconds`, RowError where measuring raised or the process died.
        """
        if self.process is None or not self.process.is_alive():
            self._start()
        partial: Row = {}
        deadline = time.monotonic() + seconds
        try:
            self.connection.send(cell)
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                kind, row = self.connection.recv()
                if kind == "row":
                    return row
                if kind == "error":
                    if row["broken"]:
                        self.close()
                    raise RowError(row["error"], partial)
                partial = row
        except (EOFError, OSError):
            self.process.join(5)
            status = self.process.exitcode
            self.close()
            raise RowError(f"the process that measured it ended with status {status}", partial) from None
        self.close()
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.function, self.device, self.log))
        self.process.start()
        theirs.close()

    def close(self) -> None:
        """End the process and what it started."""
        if self.process is None:
            return
        self.connection.close()
        self.process.join(1)
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # The process leads a group of its own from its first line on; before that, only it is there to end.
                if os.getpgid(self.process.pid) == self.process.pid:
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
        self.process = None


def run_tests(results: Results, directory: Path, root: Path, seconds: float) -> None:
    """`pytest -m gpu tests` in a child process, its output in tests.log, ended after `seconds`."""
    command = ["pytest", "-m", "gpu", "-q", "tests"]
    results.content["tests"] = run_module(command, root, directory / "tests.log", seconds)
    results.save()


def run_tuner(results: Results, directory: Path, root: Path, seconds: float) -> None:
    """`python -m mlp_fused tune` in a child process, its output in tune.log, ended after `seconds`."""
    file = directory.resolve() / f"tuned_{results.path.stem}.json"
    minutes = max(0.0, seconds - TUNE_GRACE) / 60
    command = ["mlp_fused", "tune", "--minutes", f"{minutes:.2f}", "--out", str(file)]
    outcome = run_module(command, root, directory / "tune.log", seconds)
    results.content["tune"] = {**outcome, "file": file.name if file.exists() else None}
    results.save()


def run_module(command: list[str], root: Path, log: Path, seconds: float) -> Row:
    """`python -m` something in a child process, ended after `seconds`: {"finished", "status", "summary", "seconds"}."""
    begun = time.monotonic()
    command = [sys.executable, "-m", *command]
    with log.open("w") as file:
        child = subprocess.Popen(command, cwd=root, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "finished": status is not None,
        "status": status,
        "summary": lines[-1] if lines else "",
        "seconds": round(time.monotonic() - begun, 1),
    }


def run_rows(
    cells: list[Cell],
    results: Results,
    worker: Measurer,
    deadline: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> int:
    """Measure `cells` in order until `deadline` (by `clock`), writing and saying each row; how many were written.

    A row that the deadline cuts off is not written, and is the first to run next time; one that its own limit cuts off
    is written as an error.
    """
    done = 0
    for number, cell in enumerate(cells, 1):
        begun = clock()
        left = deadline - begun
        if left < SHORTEST:
            break
        limit = ANCHOR_SECONDS if cell.anchor else ROW_SECONDS
        try:
            row = worker.measure(cell, min(limit, left))
        except TimeoutError as error:
            if left <= limit:
                say(f"[{number}/{len(cells)}] {cell}: cut off by the end of the time")
                break
            row = {"id": str(cell), "error": str(error)}
        except RowError as error:
            row = {**error.partial, "id": str(cell), "error": str(error)}
        spent = clock() - begun
        results.rows[str(cell)] = {**row, "seconds_spent": round(spent, 2)}
        results.save()
        done += 1
        times = f"{spent:.1f} s, {max(0.0, deadline - clock()):.0f} s left"
        say(f"[{number}/{len(cells)}] {cell}: {summary(row)} ({times})")
    return done


def summary(row: Row) -> str:
    """What a row says in half a line."""
    if "error" in row:
        return f"failed: {row['error']}"
    if "ms" in row:
        baselines = row["baselines"].items()
        speeds = (f"{b['speedup']:.2f}x {name}" if "speedup" in b else f"{name} failed" for name, b in baselines)
        how = row.get("path") or row["tile"]
        return f"{how}, {row['ms']:.4g} ms, {row['floor_ratio']:.2f} of the floor, {', '.join(speeds)}"
    if "copy" in row:
        ratios = (f"{p['copy']['pinned']['to_kernel']:.2f} {phase}" for phase, p in row["phases"].items())
        ahead = row["throughput"]["ways"]["prefetched"]
        moved = f"prefetched {ahead['examples_per_s']:.3g} examples/s, {ahead['of_bound']:.2f} of the bound"
        return f"pinned {row['copy']['pinned']['ms']:.4g} ms = {', '.join(ratios)} of the kernels; {moved}"
    if "kinds" in row:
        speeds = (f"{each['speedup']:.2f}x of {kind}" for kind, each in row["kinds"].items())
        return f"read where it lies {', '.join(speeds)}"
    return json.dumps(row.get("seconds"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks within a time limit")
    parser.add_argument("--minutes", type=float, default=8.0, help="ends before this many minutes (default 8)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go; carried on from")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help='ids to run, such as "narrow-*-forward"')
    parser.add_argument("--tests-share", type=float, default=TESTS_SHARE, help="part of the time for tests (0: none)")
    parser.add_argument("--tune-share", type=float, default=TUNE_SHARE, help="then for the tuner (0: none)")
    parser.add_argument("--retry", action="store_true", help="run rows again that failed")
    options = parser.parse_args(arguments)
    begun = time.monotonic()

    try:
        cells = select(options.cells)
    except ValueError as error:
        return refuse(str(error))
    if reason := why_not(GRID[0], "cuda") or distorted():
        return refuse(reason)
    deadline = begun + 60 * options.minutes - RESERVE
    found = machine()
    results = Results(options.out, found, device_slug(found["gpu"]))
    if results.note:
        print(results.note, flush=True)
    results.save()

    def say(line: str) -> None:
        print(line, flush=True)

    worker = Worker(options.out / "worker.log")
    try:
        tests = results.content["tests"]
        if options.tests_share > 0 and not (tests and tests["finished"]):
            run_tests(results, options.out, ROOT, options.tests_share * (deadline - time.monotonic()))
            tests = results.content["tests"]
            say(f"tests: {ending(tests)}")
        seconds = options.tune_share * (deadline - time.monotonic())
        if seconds > TUNE_GRACE:
            run_tuner(results, options.out, ROOT, seconds)
            say(f"tuner: {ending(results.content['tune'])}")
        todo = results.todo(cells, retry=options.retry)
        say(f"{len(cells) - len(todo)} rows are there, {len(todo)} to go, {deadline - time.monotonic():.0f} s left")
        if todo:
            results.content["ceilings"].append(worker.measure(None, max(1.0, deadline - time.monotonic())))
            results.save()
            run_rows(todo, results, worker, deadline, say=say)
    except (RowError, TimeoutError) as error:
        say(f"the ceilings could not be measured: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the rows so far are written")
        return 130
    finally:
        worker.close()
    failed = sum("error" in row for row in results.rows.values())
    say(f"{len(results.rows)} rows in {results.path}, {failed} of them failed")
    for line in goals.report(results.rows.values()):
        say(line)
    return 1 if failed or (tests and tests["status"]) else 0


def ending(outcome: Row) -> str:
    """How tests or tuner ended, in a line."""
    status = f"status {outcome['status']}" if outcome["finished"] else "cut off"
    return f"{outcome['summary']} ({outcome['seconds']} s, {status})"


def refuse(reason: str) -> int:
    print(f"nothing was measured: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
