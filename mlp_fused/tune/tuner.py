"""`mlp-fused tune`: measure the fastest tiles and paths on this GPU, for the tables that engine/paths.py reads.

For each layer of a network, three products are measured: forward, dgrad and wgrad. Each is measured by PyTorch and by
the tiles of `layer_tiles.candidates`, in the order of their estimated times. Then the paths of narrow networks are
measured as a whole; the layer path uses the tiles that were just measured. A tile or path with a wrong result is left
out, with a note.

A reading is the device's time without Python overhead: a median between events. Operands are random numbers, and calls
cycle through more of them than fit in L2. Other processes compile the kernels ahead (compiling.py), so that this
process compiles little, and nothing while its clock runs.

The time limit is divided by the number of readings that each problem should have: all candidates for an anchor, the
first `FEW` for others. Time that a problem does not use goes to the problems after it. If the time is too short for all
readings, each reading takes less time, and anchors get more of it (`ANCHOR_WEIGHT`). If time remains, problems get more
than `FEW` candidates.
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
from ..kernels.planes import PLANES
from ..progress import progress
from ..timing import Timed, between_events
from .compile_ahead import PathWork, TileWork, compile_ahead
from .config import Config
from .operands import Operands, Passes, float32_set_to
from .output import Output
from .tasks import Product, Row, Task, Whole, list_tasks, network_paths

__all__ = ["tune"]

FEW = 4  # the number of candidates that every product should have measured
ANCHOR_WEIGHT = 16  # the weight of an anchor's reading when the time is divided
NETWORK_WEIGHT = 1.7  # the weight of a network's reading; larger, because all paths of a network are always measured
SHORTEST_READING, LONGEST_READING = 0.01, 0.05  # seconds of one reading
AROUND_READING = 0.07  # seconds of overhead per reading: to load the kernel, make the operands and check the result


Clock = Callable[[Callable[[], object]], float]  # seconds that one call takes


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU. Raises RuntimeError if its context is broken, for example by an illegal memory access."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Tuner:
    """Measure tasks on a device, one after the other, within a time limit.

    Args:
        device: the device.
        gpu: the record of the device in kernels/devices.py.
        time: a function that returns the seconds of a call on the device.
        now: the clock of the time limit, in seconds.
        compilers: the processes that compile ahead.
        old: the table of earlier measurements.
        table: a function from the rows of this run to a table that includes the old rows.
        operands, passes: functions that make the tensors of a product and of a network.
        candidates: a function that returns the tiles for a problem on `gpu`, sorted by estimated time.
        synchronize: a function that waits for the device and raises RuntimeError if its context is broken.

    Attributes:
        rows: the measured rows, one for each problem, with its fastest tile or path.
        readings: the measured rows, one for each tile of a product, and one for each network.
        notes: a sentence about each tile, path or problem that was left out.
        doing: a description of the work that runs on the device, or ran last.
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
        """Measure tasks until the time is up, and call `keep` after each one.

        A task may use its part of the remaining time. Every task that is begun gets the reading of PyTorch and at least
        one tile, and a network gets all of its paths. Known tasks share the time that the new ones leave.
        """
        self.deadline = self.now() + seconds
        self._compile_ahead(tasks)
        weights = [self._weight(task) for task in tasks]
        for index, task in enumerate(progress(tasks, "tuning")):
            left = self.deadline - self.now()
            rest = sum(weight for weight, later in zip(weights[index:], tasks[index:]) if later.known == task.known)
            if isinstance(task, Whole) and (index == 0 or isinstance(tasks[index - 1], Product)):
                self._compile_paths(tasks[index:], self.table(self.rows))
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
                    f"{len(tasks) - index} of {len(tasks)} problems were not measured, from {task} on; run the same "
                    "command again to begin with them"
                )
                return
            except torch.OutOfMemoryError:
                self.notes.append(f"{task} was left out: it does not fit in GPU memory")

    def count_readings(self, task: Task) -> int:
        """Return the number of readings that a task should have, including that of PyTorch."""
        if isinstance(task, Product):
            count = len(self._candidates(task))
            return 1 + (count if task.anchor else min(FEW, count))
        return 2 + len(network_paths(task, self.gpu))

    def _weight(self, task: Task) -> float:
        """Return the weight by which a task gets its part of the time."""
        weight = NETWORK_WEIGHT if isinstance(task, Whole) else 1
        return self.count_readings(task) * weight * (ANCHOR_WEIGHT if task.anchor else 1)

    def _candidates(self, product: Product) -> tuple[tile_config.TileConfig, ...]:
        """Return the candidates of a product: the fastest tile of the old table, then tiles by estimated time."""
        row = self.old.get(product.key)
        first = (row.tile,) if row and row.tile else ()
        return tuple(dict.fromkeys((*first, *self.candidates(product.problem, self.gpu))))

    def _compile_ahead(self, tasks: Sequence[Task]) -> None:
        """Queue the kernels that every task should have measured, then those for which there may be time."""
        products = [
            [TileWork(task, tile) for tile in self._candidates(task)] for task in tasks if type(task) is Product
        ]
        few = [work for works in products for work in (works if works[0].task.anchor else works[:FEW])]
        self.compilers.ask({work.key: work for work in few})
        self._compile_paths(tasks)
        self.compilers.ask({work.key: work for works in products for work in works})

    def _compile_paths(self, tasks: Sequence[Task], table: table_files.Table | None = None) -> None:
        """Queue the kernels of the networks' paths. With a table, queue them first, and the layer paths too."""
        wholes = [task for task in tasks if isinstance(task, Whole)]
        works = [
            PathWork(task, path, table if path == "layer" else None)
            for task in wholes
            for path in (*(("layer",) if table else ()), *network_paths(task, self.gpu))
        ]
        self.compilers.ask({work.key: work for work in works}, first=table is not None)

    def _compiles(self, name: str, work: TileWork | PathWork, limit: float) -> bool:
        """Wait until the work is compiled, and return True if it compiles. Raises NotYetError at the limit."""
        reason = self.compilers.wait(work.key, limit - self.now())
        if reason is not None:
            self.notes.append(f"{name} was left out: {reason}")
        return reason is None

    def _product(self, product: Product, limit: float) -> table_files.Gemm:
        operands = self.operands(product, self.device)
        torch_ms = self._milliseconds(f"{product}, PyTorch", operands.turns(operands.by_torch))
        expected = operands.in_float32()
        # Sums of k products in fp32, added in another order, differ by about sqrt(k) roundings.
        bound = BOUNDS[product.dtype][0] + math.sqrt(product.problem.k) * 2**-24
        readings: list[table_files.Gemm] = []
        begin = self.now()
        for index, tile in enumerate(self._candidates(product)):
            name, now = f"{product}, {tile}", self.now()
            try:
                if readings and now + (now - begin) / index > limit:  # another reading would not end in time
                    break
                compiles = self._compiles(name, TileWork(product, tile), limit if readings else self.deadline)
            except NotYetError:
                if not readings:
                    raise
                break
            if not readings:  # waiting for the first tile to compile does not count as time of this product
                waited = self.now() - now
                begin, limit = begin + waited, limit + waited
            if not compiles:
                continue
            run = functools.partial(operands.by_kernel, tile=tile)
            if self._is_right(name, functools.partial(operands.written, run), expected, bound):
                ms = self._milliseconds(name, operands.turns(run))
                planes_ms = ms if tile.precision in PLANES else None
                readings.append(stamped(table_files.Gemm(*product.key, tile, ms, torch_ms, planes_ms=planes_ms)))
        readings = readings or [stamped(table_files.Gemm(*product.key, None, None, torch_ms))]
        self.readings += readings
        (row,) = table_files.fastest(readings)
        return stamped(row)

    def _network(self, whole: Whole) -> table_files.Network:
        passes = self.passes(whole, self.device)
        ms = {"torch": self._milliseconds(f"{whole}, PyTorch", passes.turns(passes.by_torch))}
        # The expected results are PyTorch's in the same dtype. In float32, some pre-activations would be on the other
        # side of relu's kink, which changes gradients by 2 % against fp16 and 8 % against bf16, more than the bounds (7
        # layers on a CPU, torch 2.13). The error of cuBLAS's partial sums in fp16 is below the bounds: 0.8 % over 2^20
        # rows (H100, torch 2.11).
        expected = passes(passes.by_torch, 0)
        runs: dict[str, Callable[[Tensor], Tensor]] = {"layer": passes.by_layers}
        for name, path in network_paths(whole, self.gpu).items():
            runs[name] = functools.partial(passes.by_network, path)
        with paths.decided_by(self.table(self.rows)):
            for path_name, run in runs.items():
                name = f"{whole}, {path_name}"
                first_pass = functools.partial(passes, run, 0)
                if self._compiles(name, PathWork(whole, path_name), self.deadline) and self._is_right(
                    name, first_pass, expected, *BOUNDS[whole.workload.dtype]
                ):
                    ms[path_name] = self._milliseconds(name, passes.turns(run))
        return stamped(table_files.Network(*whole.key, min(ms, key=lambda path_name: ms[path_name]), ms))

    def _milliseconds(self, name: str, call: Callable[[], object]) -> float:
        self.doing = name
        return max(1e3 * self.time(call), 1e-6)  # at least a nanosecond, because a time of 0 is invalid in a table

    def _is_right(
        self, name: str, run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], *bounds: float
    ) -> bool:
        """True if `run` succeeds and each result is within its bound of the expected one.

        The last bound also applies to all further results.

        Raises:
            RuntimeError: the run broke the GPU's context, so that nothing else can run in this process.
        """
        self.doing = name
        try:
            differences = [relative_error(*pair) for pair in zip(run(), expected)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # many kinds of errors: it does not compile, or needs more than the GPU has
            self.synchronize(self.device)
            self.notes.append(f"{name} was left out: it fails: {type(error).__name__}: {first_line(error)}")
            return False
        for difference, bound in zip(differences, itertools.chain(bounds, itertools.repeat(bounds[-1]))):
            if not difference <= bound:  # also for NaN
                self.notes.append(
                    f"{name} was left out: its result differs from PyTorch's (relative difference {difference:.2g})"
                )
                return False
        return True


def reading_seconds(seconds: float, readings: int) -> float:
    """Return the seconds for one reading, if `readings` of them have to fit into `seconds`."""
    return max(SHORTEST_READING, min(LONGEST_READING, seconds / max(1, readings) - AROUND_READING))


class EventClock:
    """Measure the seconds that a GPU works on a call: the median of several times between two events.

    A kernel spins while the host launches the calls. So the calls run without gaps, and Python overhead is not
    included.

    Args:
        seconds: the time to spend on one call's median.
    """

    MOST_CALLS = 20  # calls between two events; for one short call, the events would distort the time

    def __init__(self, seconds: float = LONGEST_READING) -> None:
        self.seconds = seconds

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        begin = times.perf_counter()
        call()
        issued = times.perf_counter() - begin
        torch.cuda.synchronize()
        once = times.perf_counter() - begin
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
    """Measure tiles and paths, and add the fastest to a table, which is written atomically.

    Args:
        config: the settings.
        report: called with each line of progress.
        device: the device to measure; by default the current GPU.
        time: a function that returns the seconds of a call on the device; by default `EventClock`.
        now: the clock of the time limit, in seconds.
        compilers: the processes that compile ahead; by default as many as this machine has cores and memory for.
        tasks: a function that lists the tasks in order.
        versions: a function that returns the versions of the software that times depend on, by name.
        parts: keyword arguments of `Tuner`, such as `operands` or `candidates`.

    Returns:
        The table, including old rows.

    Raises:
        UserError: no GPU can run the kernels, the GPU failed, or the file cannot be written or is not a table of this
            GPU.
        KeyboardInterrupt: Ctrl-C was pressed. The message tells how many problems were measured and written.
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
    all_tasks = tasks(config.workloads, gpu, [row.key for row in output.old.rows if not is_outdated(row)])
    if time is None:
        count = sum(map(tuner.count_readings, all_tasks))
        tuner.time = EventClock(reading_seconds(60 * config.minutes, count))
    report(f"measuring {len(all_tasks)} problems on {gpu.name} for at most {config.minutes:g} minutes, into {path}")

    def save() -> str:
        return output.save(tuner.rows, tuner.readings, len(all_tasks))

    try:
        with compilers:
            tuner.measure(all_tasks, 60 * config.minutes, lambda: output.keep(tuner.rows, tuner.readings))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {save()}") from None
    except RuntimeError as error:  # an error of the GPU, after which nothing else runs in this process
        raise UserError(f"the GPU failed at {tuner.doing}: {first_line(error)}; {save()}") from error
    sentence = save()
    if compilers.failure:
        tuner.notes.append(
            f"kernels were compiled at their launch, because compiling ahead failed: {compilers.failure}"
        )
    for note in tuner.notes:
        report(note)
    if tuner.rows:
        report(summary(tuner.rows))
    report(sentence)
    return table_files.read(path) if tuner.rows else output.old


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(
            "mlp-fused tune needs a GPU, but PyTorch can use none here; mlp-fused env prints what PyTorch finds"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reason = paths.why_not((), torch.float32, device, "triton", planned=False)
    if reason is not None:
        raise UserError(f"the kernels cannot run on {device}: {reason}")
    if (reason := distorted()) is not None:
        raise UserError(reason)
    return device


def summary(rows: Sequence[Row]) -> str:
    """Return a table of the measured problems, and the number of problems in which the kernels are faster."""
    header = ("problem", "torch ms", "ours ms", "ratio", "fastest")
    body, ratios = [], []
    for row in rows:
        if isinstance(row, table_files.Gemm):
            named = row.activation if row.activation not in (None, "identity") else ""
            problem = f"{row.kind} {row.width_in} -> {row.width_out}{named and f', {named}'}, {row.rows} rows"
            ours, torch_ms = row.ms, row.torch_ms
            fastest = str(row.tile or "PyTorch")
        else:
            phase = "training" if row.training else "inference"
            problem = f"{phase} {'-'.join(map(str, row.widths))}, {row.activation}, {row.rows} rows"
            ours = min((ms for name, ms in row.ms.items() if name != "torch"), default=None)
            torch_ms = row.ms["torch"]
            fastest = "PyTorch" if row.path == "torch" else row.path
        problem += f", {row.dtype}{' (tf32)' if row.precision == 'tf32' else ''}"
        if ours is not None:
            ratios.append((torch_ms / ours, problem))
        cells = ("-", "-") if ours is None else (f"{ours:.4f}", f"{torch_ms / ours:.2f}")
        body.append((problem, f"{torch_ms:.4f}", *cells, fastest))
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if i in (1, 2, 3) else cell.ljust(width) for i, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths))) for row in [header, *body])
    ]
    faster = sum(ratio > 1 for ratio, _ in ratios)
    lines.append(f"ratio: PyTorch's time / ours; our kernels are faster in {faster} of {len(rows)} problems")
    if ratios:
        worst, problem = min(ratios)
        lines[-1] += f"; the worst ratio is {worst:.2f}, of {problem}"
    return "\n".join(lines)
