"""Measuring what is fastest on this GPU, for the tables that engine/paths.py asks: what `mlp-fused tune` does.

Of each layer of a network three products are measured, forward, dgrad and wgrad: torch's own, and the tiles of
`layer_tiles.candidates`, the likeliest first. Then, of networks that fit in one kernel, their paths as a whole: that
of layers runs with the tiles that were just found. A tile or path whose result is not torch's is left out, and said.

Times are what the device works, without the host's part of a call: medians between events, operands taken in turn from
more memory than L2 holds, random numbers in them. The measuring process compiles nothing while its clock runs, and
little otherwise: the kernels are compiled ahead by others (compiling.py).

The time is shared by how many readings each problem should have: all of its candidates in an anchor, the first `FEW` of
all others; what one leaves is for those after it. So there is time for candidates beyond those few where all of them
have had theirs, and where time is short the anchors come first, by `ANCHOR_WEIGHT`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import math
import statistics
import time as times
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from ..files import check_writable
from ..kernels import devices, layer_tiles, tile_config
from ..kernels.language import driver
from ..progress import progress
from ..timing import Timed, between_events
from .compile_ahead import PathWork, TileWork, compile_ahead
from .config import Config
from .operands import Operands, Passes, float32_set_to
from .tasks import Product, Row, Task, Whole, list_tasks, network_paths

__all__ = ["tune"]

FEW = 4  # candidates of a product that every one should have measured
ANCHOR_WEIGHT = 16  # of a reading of an anchor


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
        new: a table without rows, for what is measured now.
        operands, passes: make the tensors of a product, and of a network.
        candidates: the tiles for a problem on `gpu`, the likeliest first.
        synchronize: waits for the device, and raises RuntimeError if it is broken.

    Attributes:
        rows: what was measured.
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
        new: table_files.Table,
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
        self.tables = old, new
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.doing = ""
        self.deadline = math.inf

    @property
    def table(self) -> table_files.Table:
        """All rows: what was measured now, and of what was there before the rest."""
        old, new = self.tables
        gemms = tuple(row for row in self.rows if isinstance(row, table_files.Gemm))
        networks = tuple(row for row in self.rows if isinstance(row, table_files.Network))
        return tables.merge(old, replace(new, gemms=gemms, networks=networks))

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
                self._ask_paths(tasks[index:], self.table)
            self.doing = str(task)
            try:
                if left <= 0:
                    raise NotYetError
                with float32_set_to(task.precision):
                    if isinstance(task, Product):
                        self.rows.append(self._product(task, self.now() + left * weights[index] / rest))
                    else:
                        self.rows.append(self._network(task))
                keep()
            except NotYetError:
                self.notes.append(
                    f"{len(tasks) - index} of {len(tasks)} problems were not reached, the first of them {task}; "
                    "the same command again begins with them"
                )
                return
            except torch.OutOfMemoryError:
                self.notes.append(f"{task} was left out: it does not fit in the GPU's memory")

    def _weight(self, task: Task) -> int:
        """Of its part of the time: how many readings it should have, torch's and those of our kernels."""
        if isinstance(task, Product):
            count = len(self._candidates(task))
            readings = 1 + (count if task.anchor else min(FEW, count))
        else:
            readings = 2 + len(network_paths(task, self.gpu))
        return readings * (ANCHOR_WEIGHT if task.anchor else 1)

    def _candidates(self, product: Product) -> tuple[tile_config.TileConfig, ...]:
        """What was the fastest before, then by the rule's estimate."""
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
        """Whether it does, as soon as it has; raises NotYetError at the limit."""
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
        best: tuple[float, tile_config.TileConfig] | None = None
        begun = self.now()
        for index, tile in enumerate(self._candidates(product)):
            what, asked = f"{product}, {tile}", self.now()
            try:
                if best is not None and asked + (asked - begun) / index > limit:  # one more would not end in time
                    break
                compiles = self._compiles(what, TileWork(product, tile), limit if best else self.deadline)
            except NotYetError:
                if best is None:
                    raise
                break
            if best is None:  # what it had to wait for a first tile is no part of its time
                waited = self.now() - asked
                begun, limit = begun + waited, limit + waited
            if not compiles:
                continue
            ours = functools.partial(operands.by_kernel, tile=tile)
            if self._is_right(what, functools.partial(operands.written, ours), expected, bound):
                ms = self._milliseconds(what, operands.turns(ours))
                if best is None or ms < best[0]:
                    best = ms, tile
        ms_of_best, tile_of_best = best or (None, None)
        faster = ms_of_best is not None and ms_of_best < torch_ms
        return stamped(table_files.Gemm(*product.key, tile_of_best if faster else None, ms_of_best, torch_ms))

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
        with paths.decided_by(self.table):
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


class EventClock:
    """Seconds that a GPU works on a call: the median of some readings between two events.

    The calls wait behind a kernel that spins for as long as the host takes to issue them, so that the host's part is
    not in the reading.
    """

    SECONDS = 0.05  # for one number
    MOST_CALLS = 20  # between two events, which would be a good part of one short call's reading

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        begun = times.perf_counter()
        call()
        issued = times.perf_counter() - begun
        torch.cuda.synchronize()
        once = times.perf_counter() - begun
        calls = max(1, min(self.MOST_CALLS, math.ceil(200e-6 / once)))
        rounds = max(5, min(50, math.ceil(self.SECONDS / (once * calls))))
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
    utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    empty = table_files.Table(gpu.name, utc, versions(), arch=gpu.arch, multiprocessors=gpu.multiprocessors)
    old = _existing(path, empty, report)
    if compilers is None:
        on_gpu = device.type == "cuda"
        target = driver.active.get_current_target() if on_gpu else None
        compilers = Compilers(compile_ahead, gpu, target, count_workers() if on_gpu else 0)
    tuner = Tuner(device, gpu, time or EventClock(), now, compilers, old, empty, **parts)

    known: list[tuple[Any, ...]] = [row.key for row in old.rows if not is_outdated(row)]
    asked = tasks(config.workloads, gpu, known)
    report(f"{len(asked)} problems on {gpu.name}, {config.minutes:g} minutes at the most, into {path}")

    def save() -> str:
        """Write what was measured so far; says so."""
        if not tuner.rows:
            return f"nothing was measured; {path} is as it was"
        try:
            table_files.write(path, tuner.table)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {first_line(error)}; what was there before is as it was") from None
        paths.forget_tables()
        return f"{len(tuner.rows)} of {len(asked)} problems were measured, and are in {path}"

    def keep() -> None:
        """The same without a word: a kernel that hangs leaves a process no other end than being killed."""
        with contextlib.suppress(OSError):  # which `save` will tell of
            table_files.write(path, tuner.table)

    try:
        with compilers:
            tuner.measure(asked, 60 * config.minutes, keep)
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
    return table_files.read(path) if tuner.rows else old


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


def _existing(path: Path, empty: table_files.Table, report: Callable[[str], None]) -> table_files.Table:
    """What the file holds already and what still holds. Before minutes of measuring: whether it can be written."""
    try:
        old = table_files.read(path)
    except FileNotFoundError:
        old = empty
    except ValueError as error:
        raise UserError(f"{error}, so it will not be overwritten; delete it, or name another with --out") from None
    if old.device != empty.device:
        raise UserError(f"{path} was measured on {old.device}, this is {empty.device}; name another file with --out")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path.resolve().parent}, the folder of --out: {error.strerror}") from None
    check_writable(path, "--out")
    if old.versions != empty.versions:
        names = [
            name for name in {**old.versions, **empty.versions} if old.versions.get(name) != empty.versions.get(name)
        ]
        then, today = (
            ", ".join(f"{name} {table.versions.get(name, 'none')}" for name in names) for table in (old, empty)
        )
        dropped = len(old.gemms) + len(old.networks)
        report(f"{path} was measured with {then}; this is {today}, so its {dropped} rows are dropped")
        return empty
    return old


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
