"""Measuring what is fastest on this GPU, for the tables that engine/paths.py asks: what `mlp-fused tune` does.

Of each layer of a network three products are measured, forward, dgrad and wgrad: torch's own, and the tiles of
`layer_tiles.candidates`, the likeliest first. Then, of networks that fit in one kernel, their paths as a whole: that
of layers runs with the tiles that were just found. A tile or path whose result is not torch's is left out, and said.

Times are what the device works, without the host's part of a call: medians between events, operands taken in turn from
more memory than L2 holds, random numbers in them. The measuring process compiles nothing while its clock runs, and
little otherwise: the kernels are compiled ahead by others (compiling.py).

The time is shared by how many readings each problem should have: all of its candidates in an anchor, the first `FEW` of
all others; what one leaves is for those after it. Where that is more than there is time for, each is timed for less
long. So there is time for candidates beyond those few where all of them
have had theirs, and where time is short the anchors come first, by `ANCHOR_WEIGHT`.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import statistics
import time as times
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..agreement import BOUNDS, relative_error
from ..compiling import Compilers, NotYetError, count_workers
from ..engine import paths, table_files, tables
from ..engine.row_kernels import is_outdated, stamped
from ..environment import distorted, versions
from ..errors import UserError, first_line
from ..kernels import devices, layer_tiles, tile_config
from ..kernels.language import driver
from ..progress import progress
from ..timing import Timed, between_events
from .compile_ahead import PathWork, TileWork, compile_ahead
from .config import Config
from .operands import Operands, Passes, float32_set_to
from .output import Output
from .tasks import Product, Row, Task, Whole, list_tasks, network_paths

__all__ = ["tune"]

FEW = 4  # candidates of a product that every one should have measured
ANCHOR_WEIGHT = 16  # of a reading of an anchor
NETWORK_WEIGHT = 1.7  # of a reading of a network, where no path is left out for want of time, as a product's tiles are
SHORTEST_READING, LONGEST_READING = 0.01, 0.05  # seconds that are timed for one number
AROUND_READING = 0.07  # seconds of loading a kernel, and of making and checking what is read


Clock = Callable[[Callable[[], object]], float]  # seconds that one call takes


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU. Raises RuntimeError where its context is broken, as after an illegal memory access."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Tuner:
    """Measures tasks on a device, one after the other, within a time.

    Args:
        gpu: the device, as our rules know it.
        time: seconds that one call takes on the device.
        now: seconds of a clock that the time limit goes by.
        compilers: what compiles ahead.
        old: what was measured before.
        table: returns the table of what was measured now, from its rows, beside what was measured before.
        operands, passes: make the tensors of a product, and of a network.
        candidates: the tiles for a problem on `gpu`, the likeliest first.
        synchronize: waits for the device, and raises RuntimeError if it is broken.

    Attributes:
        rows: what was measured: of each problem the fastest.
        readings: the same, with a row for each tile of a product that was measured.
        notes: what was left out and why, a sentence each.
        doing: what runs on the device, or ran last.
    """

    def __init__(
        self,
        device: torch.device,
        gpu: devices.Device,
        time: Clock,
        now: Callable[[], float],
        compilers: Compilers,
        old: table_files.Table,
        table: Callable[[list[Row]], table_files.Table],
        operands: Callable[..., Operands] = Operands,
        passes: Callable[..., Passes] = Passes,
        candidates: Callable[..., Sequence[tile_config.TileConfig]] = layer_tiles.candidates,
        synchronize: Callable[[torch.device], None] = _synchronize,
    ) -> None:
        self.gpu = gpu
        self.device = device
        self.time = time
        self.now = now
        self.compilers = compilers
        self.operands, self.passes = operands, passes
        self.candidates, self.synchronize = candidates, synchronize
        self.old = {row.key: row for row in old.gemms}
        self.table = table
        self.rows: list[Row] = []
        self.readings: list[Row] = []
        self.notes: list[str] = []
        self.doing = ""
        self.deadline = math.inf

    def measure(self, tasks: Sequence[Task], seconds: float, keep: Callable[[], object] = lambda: None) -> None:
        """As many tasks as there is time for; each may take its part of what is left, and is followed by `keep`.

        A task that is begun is measured at least with torch's product and one tile, a network with all of its paths.
        What is known already shares what the others leave.
        """
        self.deadline = self.now() + seconds
        self._ask_ahead(tasks)
        weights = [self._weight(task) for task in tasks]
        for index, task in enumerate(progress(tasks, "tuning")):
            left = self.deadline - self.now()
            rest = sum(weight for weight, later in zip(weights[index:], tasks[index:]) if later.known == task.known)
            if isinstance(task, Whole) and (index == 0 or isinstance(tasks[index - 1], Product)):
                self._ask_paths(tasks[index:], self.table(self.rows))
            self.doing = str(task)
            try:
                if left <= 0:
                    raise NotYetError
                with float32_set_to(task.precision):
                    if isinstance(task, Product):
                        self.rows.append(self._product(task, self.now() + left * weights[index] / rest))
                    else:
                        self.rows.append(self._network(task))
                        self.readings.append(self.rows[-1])
                keep()
            except NotYetError:
                self.notes.append(
                    f"{len(tasks) - index} of {len(tasks)} problems were not reached, the first of them {task}; "
                    "the same command again begins with them"
                )
                return
            except torch.OutOfMemoryError:
                self.notes.append(f"{task} was left out: it does not fit in the GPU's memory")

    def count_readings(self, task: Task) -> int:
        """The readings that a task should have: torch's, and those of our kernels."""
        if isinstance(task, Product):
            count = len(self._candidates(task))
            return 1 + (count if task.anchor else min(FEW, count))
        return 2 + len(network_paths(task, self.gpu))

    def _weight(self, task: Task) -> float:
        """The weight of a task's part of the time."""
        weight = NETWORK_WEIGHT if isinstance(task, Whole) else 1
        return self.count_readings(task) * weight * (ANCHOR_WEIGHT if task.anchor else 1)

    def _candidates(self, product: Product) -> tuple[tile_config.TileConfig, ...]:
        """The candidates: the fastest before, then by the rule's estimate."""
        before = self.old.get(product.key)
        first = (before.tile,) if before and before.tile else ()
        return tuple(dict.fromkeys((*first, *self.candidates(product.problem, self.gpu))))

    def _ask_ahead(self, tasks: Sequence[Task]) -> None:
        """Have compiled, in order, what every task should have measured; then what there may be time for."""
        works = [[TileWork(task, tile) for tile in self._candidates(task)] for task in tasks if type(task) is Product]
        few = [work for each in works for work in (each if each[0].task.anchor else each[:FEW])]
        self.compilers.ask({work.key: work for work in few})
        self._ask_paths(tasks)
        self.compilers.ask({work.key: work for each in works for work in each})

    def _ask_paths(self, tasks: Sequence[Task], table: table_files.Table | None = None) -> None:
        """Have compiled the paths of the networks; once there is a table, that of layers too, and before all else."""
        wholes = [task for task in tasks if isinstance(task, Whole)]
        works = [
            PathWork(task, path, table if path == "layer" else None)
            for task in wholes
            for path in (*(("layer",) if table else ()), *network_paths(task, self.gpu))
        ]
        self.compilers.ask({work.key: work for work in works}, first=table is not None)

    def _compiles(self, what: str, work: TileWork | PathWork, limit: float) -> bool:
        """True if it compiles, as soon as it has; raises NotYetError at the limit."""
        reason = self.compilers.wait(work.key, limit - self.now())
        if reason is not None:
            self.notes.append(f"{what} was left out: {reason}")
        return reason is None

    def _product(self, product: Product, limit: float) -> table_files.Gemm:
        operands = self.operands(product, self.device)
        torch_ms = self._milliseconds(f"{product}, torch's own", operands.turns(operands.by_torch))
        expected = operands.in_float32()
        # Sums of k products in fp32, added in another order, differ by about sqrt(k) roundings.
        bound = BOUNDS[product.dtype][0] + math.sqrt(product.problem.k) * 2**-24
        readings: list[table_files.Gemm] = []
        begun = self.now()
        for index, tile in enumerate(self._candidates(product)):
            what, asked = f"{product}, {tile}", self.now()
            try:
                if readings and asked + (asked - begun) / index > limit:  # one more would not end in time
                    break
                compiles = self._compiles(what, TileWork(product, tile), limit if readings else self.deadline)
            except NotYetError:
                if not readings:
                    raise
                break
            if not readings:  # what it had to wait for a first tile is no part of its time
                waited = self.now() - asked
                begun, limit = begun + waited, limit + waited
            if not compiles:
                continue
            ours = functools.partial(operands.by_kernel, tile=tile)
            if self._is_right(what, functools.partial(operands.written, ours), expected, bound):
                ms = self._milliseconds(what, operands.turns(ours))
                readings.append(stamped(table_files.Gemm(*product.key, tile, ms, torch_ms)))
        readings = readings or [stamped(table_files.Gemm(*product.key, None, None, torch_ms))]
        self.readings += readings
        (row,) = table_files.fastest(readings)
        return stamped(row)

    def _network(self, whole: Whole) -> table_files.Network:
        passes = self.passes(whole, self.device)
        ms = {"torch": self._milliseconds(f"{whole}, torch's own", passes.turns(passes.by_torch))}
        # By torch in the same dtype: in float32 some pre-activations fall on the other side of relu's kink, which moves
        # gradients by 2 % against fp16 and 8 % against bf16, more than the bounds (7 layers on a CPU, torch 2.13). What
        # cuBLAS's partial sums lose in fp16 is below the bound: 0.8 % over 2^20 rows (H100, torch 2.11).
        expected = passes(passes.by_torch, 0)
        runs: dict[str, Callable[[Tensor], Tensor]] = {"layer": passes.by_layers}
        for name, path in network_paths(whole, self.gpu).items():
            runs[name] = functools.partial(passes.by_network, path)
        with paths.decided_by(self.table(self.rows)):
            for name, run in runs.items():
                what = f"{whole}, {name}"
                right = functools.partial(passes, run, 0)
                if self._compiles(what, PathWork(whole, name), self.deadline) and self._is_right(
                    what, right, expected, *BOUNDS[whole.workload.dtype]
                ):
                    ms[name] = self._milliseconds(what, passes.turns(run))
        return stamped(table_files.Network(*whole.key, min(ms, key=lambda name: ms[name]), ms))

    def _milliseconds(self, what: str, call: Callable[[], object]) -> float:
        self.doing = what
        return max(1e3 * self.time(call), 1e-6)  # a nanosecond at the least: nothing at all is no time

    def _is_right(
        self, what: str, run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], *bounds: float
    ) -> bool:
        """True if a kernel runs and each result is as expected, within its bound. The last bound holds for the rest.

        Raises:
            RuntimeError: it broke the GPU's context, in which nothing else runs from now on.
        """
        self.doing = what
        try:
            differences = [relative_error(*pair) for pair in zip(run(), expected)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many classes: it does not compile, or it takes more than the GPU has
            self.synchronize(self.device)
            self.notes.append(f"{what} was left out: it fails: {type(error).__name__}: {first_line(error)}")
            return False
        for difference, bound in zip(differences, itertools.chain(bounds, itertools.repeat(bounds[-1]))):
            if not difference <= bound:  # NaN is no right answer
                self.notes.append(
                    f"{what} was left out: its result is not torch's (relative difference {difference:.2g})"
                )
                return False
        return True


def reading_seconds(seconds: float, readings: int) -> float:
    """The time that the clock of one reading runs, where so many have to fit into so many seconds."""
    return max(SHORTEST_READING, min(LONGEST_READING, seconds / max(1, readings) - AROUND_READING))


class EventClock:
    """Seconds that a GPU works on a call: the median of some readings between two events.

    The calls wait behind a kernel that spins for as long as the host takes to issue them, so that the host's part is
    not in the reading.
    """

    MOST_CALLS = 20  # between two events, which would be a good part of one short call's reading

    def __init__(self, seconds: float = LONGEST_READING) -> None:
        self.seconds = seconds  # for one number

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        begun = times.perf_counter()
        call()
        issued = times.perf_counter() - begun
        torch.cuda.synchronize()
        once = times.perf_counter() - begun
        calls = max(1, min(self.MOST_CALLS, math.ceil(200e-6 / once)))
        rounds = max(5, min(50, math.ceil(self.seconds / (once * calls))))
        spin = 2 * issued * calls + 50e-6
        return 1e-3 * statistics.median(between_events(Timed(lambda _: call()), rounds, calls, spin))


def tune(
    config: Config,
    *,
    report: Callable[[str], None] = print,
    device: torch.device | None = None,
    time: Clock | None = None,
    now: Callable[[], float] = times.monotonic,
    compilers: Compilers | None = None,
    tasks: Callable[..., list[Task]] = list_tasks,
    versions: Callable[[], dict[str, str]] = versions,
    **parts: Any,
) -> table_files.Table:
    """Measure what is asked for, and write it into a table, whole or not at all, beside what that holds already.

    Args:
        config: what to do.
        report: is given what a user wants to read, piece by piece.
        device: what to measure on; the current GPU by default.
        time: seconds of one call; the GPU's events by default.
        now: seconds of a clock that the time limit goes by.
        compilers: what compiles ahead; by default as many processes as this machine has room for.
        tasks: lists what is to be measured, in order.
        versions: returns what the measurement depends on besides the GPU.
        parts: keyword arguments of Tuner, such as `operands` or `candidates`.

    Raises:
        UserError: there is no GPU for the kernels, or it failed; the file cannot be written, or is no table of this
            device.
        KeyboardInterrupt: Ctrl-C; its text says what was written.
    """
    device = device or _gpu()
    gpu = devices.describe(device.type, device.index or 0)
    path = Path(config.out) if config.out is not None else tables.user_path(gpu.name)
    readings = None if config.readings is None else Path(config.readings)
    utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    empty = table_files.Table(gpu.name, utc, versions(), arch=gpu.arch, multiprocessors=gpu.multiprocessors)
    output = Output(path, readings, empty, report, now)
    if compilers is None:
        on_gpu = device.type == "cuda"
        target = driver.active.get_current_target() if on_gpu else None
        compilers = Compilers(compile_ahead, gpu, target, count_workers() if on_gpu else 0)
    tuner = Tuner(device, gpu, time or EventClock(), now, compilers, output.old, output.table, **parts)
    asked = tasks(config.workloads, gpu, [row.key for row in output.old.rows if not is_outdated(row)])
    if time is None:
        count = sum(map(tuner.count_readings, asked))
        tuner.time = EventClock(reading_seconds(60 * config.minutes, count))
    report(f"{len(asked)} problems on {gpu.name}, {config.minutes:g} minutes at the most, into {path}")

    def save() -> str:
        return output.save(tuner.rows, tuner.readings, len(asked))

    try:
        with compilers:
            tuner.measure(asked, 60 * config.minutes, lambda: output.keep(tuner.rows, tuner.readings))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {save()}") from None
    except RuntimeError as error:  # the GPU's; after one of its errors nothing else runs in this process
        raise UserError(f"the GPU failed at {tuner.doing}: {first_line(error)}; {save()}") from error
    written = save()
    if compilers.failure:
        tuner.notes.append(f"kernels were compiled where they were launched, as ahead it failed: {compilers.failure}")
    for note in tuner.notes:
        report(note)
    if tuner.rows:
        report(summary(tuner.rows))
    report(written)
    return table_files.read(path) if tuner.rows else output.old


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(
            "tuning measures a GPU, and there is none that torch can use; mlp-fused env says what was found"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reason = paths.why_not((), torch.float32, device, "triton", planned=False)
    if reason is not None:
        raise UserError(f"there are no kernels to tune: {reason}")
    if (reason := distorted()) is not None:
        raise UserError(reason)
    return device


def summary(rows: Sequence[Row]) -> str:
    """A table of what was measured, and how our kernels did against torch."""
    header = ("problem", "torch ms", "ours ms", "ratio", "fastest")
    body, ratios = [], []
    for row in rows:
        if isinstance(row, table_files.Gemm):
            named = row.activation if row.activation not in (None, "identity") else ""
            problem = f"{row.kind} {row.width_in} -> {row.width_out}{named and f', {named}'}, {row.rows} rows"
            ours, torchs = row.ms, row.torch_ms
            fastest = str(row.tile or "torch's own")
        else:
            phase = "training" if row.training else "inference"
            problem = f"{phase} {'-'.join(map(str, row.widths))}, {row.activation}, {row.rows} rows"
            ours = min((ms for name, ms in row.ms.items() if name != "torch"), default=None)
            torchs = row.ms["torch"]
            fastest = "torch's own" if row.path == "torch" else row.path
        problem += f", {row.dtype}{' (tf32)' if row.precision == 'tf32' else ''}"
        if ours is not None:
            ratios.append((torchs / ours, problem))
        cells = ("-", "-") if ours is None else (f"{ours:.4f}", f"{torchs / ours:.2f}")
        body.append((problem, f"{torchs:.4f}", *cells, fastest))
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if i in (1, 2, 3) else cell.ljust(width) for i, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths))) for row in [header, *body])
    ]
    won = sum(ratio > 1 for ratio, _ in ratios)
    lines.append(f"ratio: torch's time over ours. Our kernels won {won} of {len(rows)}")
    if ratios:
        worst, problem = min(ratios)
        lines[-1] += f"; the worst ratio is {worst:.2f}, of {problem}"
    return "\n".join(lines)
