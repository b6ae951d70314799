"""Measuring what is fastest on this GPU, for the tables that plan.py asks: what `mlp-fused tune` does.

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
import tempfile
import time as times
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from . import plan, reference
from .agreement import BOUNDS, relative_error
from .chain import run_layers
from .compiling import Compilers, NotYetError, count_workers
from .environment import distorted, versions
from .functional import Layer, find_layers
from .grid import ACTIVATION, ANCHORS, GRID, DtypeName, Family, Workload
from .kernels import configs, layer_tiles, tables
from .kernels.activations import ACTIVATIONS, Activation, resolve
from .kernels.language import driver
from .kernels.layer_backward import dgrad, wgrad
from .kernels.layer_forward import layer_forward
from .layers import layer_path
from .networks import run_network
from .products import dgrad_by_torch, forward_by_torch, wgrad_by_torch
from .timing import Timed, between_events
from .training import UserError, first_line, progress

__all__ = ["ANCHORS", "GRID", "Config", "Family", "Workload", "tune"]

ARITHMETIC: dict[str, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}
MOST_SETS = 1024  # of operands to take in turn
FEW = 4  # candidates of a product that every one should have measured
ANCHOR_WEIGHT = 16  # of a reading of an anchor

BATCHES = (64, 1024)  # what --dims is measured with where the flags do not say otherwise
DTYPES: tuple[DtypeName, ...] = ("fp32", "bf16")

Clock = Callable[[Callable[[], object]], float]  # seconds that one call takes


@dataclass(frozen=True)
class Config:
    """What `mlp-fused tune` is told: one field for each of its flags.

    Attributes:
        dims: networks, each by its widths from the input to the output; none for the benches' grid.
        batch: numbers of rows, for `dims`; None for 64 and 1024.
        dtype: "fp32", "tf32", "bf16", "fp16", for `dims`; None for fp32 and bf16.
        activation: after every hidden layer of `dims`, by name; None for relu.
        minutes: how long it may take, about.
        out: the file to write; None for the user's own table, which is the one that is read.

    Raises:
        UserError: a value that cannot be used.
    """

    dims: tuple[tuple[int, ...], ...] = ()
    batch: tuple[int, ...] | None = None
    dtype: tuple[DtypeName, ...] | None = None
    activation: str | None = None
    minutes: float = 10.0
    out: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(map(tuple, self.dims or ())))
        for name in ("batch", "dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("batch", "dtype", "activation"):
            if getattr(self, name) is not None and not self.dims:
                raise UserError(f"--{name} is of networks that --dims gives; without --dims the grid is measured")
        for widths in self.dims:
            if len(widths) < 2 or min(widths) < 1:
                shown = " ".join(map(str, widths)) or "empty"
                raise UserError(f"--dims is {shown}; it needs to be two widths or more, each 1 or more, such as 784 10")
        if self.batch is not None and (not self.batch or min(self.batch) < 1):
            raise UserError(f"--batch is {' '.join(map(str, self.batch)) or 'empty'}; it needs to be 1 or more")
        for dtype in self.dtype or ():
            if dtype not in get_args(DtypeName):
                raise UserError(f"--dtype is {dtype}; it needs to be one of {', '.join(get_args(DtypeName))}")
        if not 0 < self.minutes < math.inf:
            raise UserError(f"--minutes is {self.minutes}; it needs to be a finite number above 0")
        try:
            resolve(self.activation, "--activation")
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def workloads(self) -> list[Workload]:
        """What is to be measured."""
        if not self.dims:
            return [*ANCHORS, *(workload for family in GRID for workload in family.workloads)]
        asked = Family(
            "asked for", self.dims, self.batch or BATCHES, self.dtype or DTYPES, (self.activation or ACTIVATION,)
        )
        return asked.workloads


@dataclass(frozen=True)
class Product:
    """One product of a layer, with what its epilogue does: a row of a table to be."""

    kind: configs.Kind
    rows: int
    width_out: int
    width_in: int
    dtype: DtypeName
    activation: str  # forward: the layer's own; dgrad: that of the layer below
    share: float = field(compare=False)  # of its network's FLOPs
    anchor: bool = field(compare=False, default=False)
    known: bool = field(compare=False, default=False)  # whether the table has it already

    def __str__(self) -> str:
        activation = "" if self.activation == "identity" else f", {self.activation}"
        return f"{self.kind} {self.width_in} -> {self.width_out}{activation}, {self.rows} rows, {self.dtype}"

    @property
    def precision(self) -> str:
        """How fp32 is multiplied."""
        return ARITHMETIC[self.dtype][1]

    @property
    def key(self) -> tuple[configs.Kind, int, int, int, str, str, str]:
        dtype = _name(ARITHMETIC[self.dtype][0])
        return self.kind, self.rows, self.width_out, self.width_in, dtype, self.precision, self.activation

    @property
    def problem(self) -> configs.Problem:
        """What a tile is chosen by."""
        return tables.Gemm(*self.key, None, None, 1.0).problem


@dataclass(frozen=True)
class Whole:
    """A network as a whole, in training (forward and backward) or in inference: a row of a table to be."""

    workload: Workload
    training: bool
    share: float = field(compare=False, default=1.0)
    anchor: bool = field(compare=False, default=False)
    known: bool = field(compare=False, default=False)

    def __str__(self) -> str:
        work = self.workload
        widths = "-".join(map(str, work.widths))
        phase = "training" if self.training else "inference"
        return f"{phase} {widths}, {work.activation}, {work.rows} rows, {work.dtype}"

    @property
    def precision(self) -> str:
        """How fp32 is multiplied."""
        return ARITHMETIC[self.workload.dtype][1]

    @property
    def key(self) -> tuple[tuple[int, ...], int, str, str, str, bool]:
        work = self.workload
        dtype = _name(ARITHMETIC[work.dtype][0])
        return work.widths, work.rows, dtype, self.precision, _activations(work)[0].name, self.training


Task = Product | Whole
Row = tables.Gemm | tables.Network


def products(workload: Workload) -> list[Product]:
    """The three products of each layer, each once."""
    layers = list(itertools.pairwise(workload.widths))
    total = 3 * sum(n * k for k, n in layers)
    found: dict[tuple[Any, ...], Product] = {}
    for index, (k, n) in enumerate(layers):
        own = workload.activation if index + 1 < len(layers) else "identity"
        below = workload.activation if index else "identity"
        each: list[tuple[configs.Kind, str]] = [("forward", own), ("dgrad", below), ("wgrad", "identity")]
        for kind, activation in each:
            product = Product(kind, workload.rows, n, k, workload.dtype, activation, n * k / total)
            alike = product.key[:-1]
            if known := found.get(alike):
                # Of layers alike, the one whose epilogue has something to do; the estimate decides the other.
                product = replace(
                    product if known.activation == "identity" else known, share=known.share + product.share
                )
            found[alike] = product
    return list(found.values())


def tasks(workloads: Iterable[Workload], gpu: configs.Device, known: Iterable[tuple[Any, ...]] = ()) -> list[Task]:
    """What is to be measured, each once, in order.

    What is not `known` yet; products, then networks; anchors; what most of a network's FLOPs are in.
    """
    found: dict[tuple[Any, ...], Task] = {}
    anchors = set()
    for workload in workloads:
        each: list[Task] = [*products(workload)]
        for training in (True, False):
            if isinstance(_network_plan(workload, gpu, training, False), plan.NetworkPlan):
                each.append(Whole(workload, training))
        for task in each:
            first = found.setdefault(task.key, task)
            if task.share > first.share:
                found[task.key] = replace(first, share=task.share)
            if workload in ANCHORS:
                anchors.add(task.key)
    known = set(known)
    ranked = [replace(task, anchor=key in anchors, known=key in known) for key, task in found.items()]
    return sorted(ranked, key=lambda task: (task.known, isinstance(task, Whole), not task.anchor, -task.share))


def network_paths(whole: Whole, gpu: configs.Device) -> dict[str, plan.NetworkPlan]:
    """Of a network as a whole, the paths through its own kernels, by name."""
    found = {}
    for name, recompute in (("recompute", True), ("stored", False)) if whole.training else (("network", False),):
        path = _network_plan(whole.workload, gpu, whole.training, recompute)
        if isinstance(path, plan.NetworkPlan) and path.formulation in (name, None):
            found[name] = path
    return found


@dataclass(frozen=True)
class TileWork:
    """A product's kernel by a tile, to be compiled."""

    task: Product
    tile: configs.TileConfig

    @property
    def key(self) -> tuple[Any, ...]:
        """What those agree in that are one compiled kernel: of the sizes, what Triton and our launchers look at.

        (Where two of one key are two kernels after all, the second is compiled where it is launched.)
        """
        each = (self.task.width_out, self.task.width_in)
        widths = tuple((width == 1, width % 16 == 0, width % self.tile.block_k == 0) for width in each)
        tile = replace(self.tile, programs=0, split=min(self.tile.split, 2))
        return self.task.kind, self.task.dtype, self.task.activation, widths, self.task.rows * max(each) >= 2**31, tile


@dataclass(frozen=True)
class PathWork:
    """A whole network's kernels on a path, to be compiled; on that of layers with the tiles that are in force."""

    task: Whole
    path: str
    table: tables.Table | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """As above; a network's own kernels do not depend on the rows."""
        work = self.task.workload if self.path == "layer" else replace(self.task.workload, rows=1)
        return self.path, self.task.training, work


def compile_ahead(work: TileWork | PathWork) -> None:
    """Compile what measuring would launch, where `compiling.compile_only` holds."""
    meta = torch.device("meta")
    with _float32_precision(work.task.precision):
        if isinstance(work, TileWork):
            Operands(work.task, meta).by_kernel(0, work.tile)
            return
        passes = Passes(work.task, meta)
        if work.table is None:
            gpu = configs.device_of(passes.xs[0])
            passes(functools.partial(passes.by_network, network_paths(work.task, gpu)[work.path]), 0)
        else:
            with _in_force(work.table):
                passes(passes.by_layers, 0)


@contextlib.contextmanager
def _in_force(table: tables.Table) -> Iterator[None]:
    """Within the block, decide by a table before those on disk."""
    with tables.asked_first(table):
        _forget_tables()
        yield
    _forget_tables()


def _forget_tables() -> None:
    """Decide anew: for after tables have changed."""
    plan.forget_tables()
    layer_path.cache_clear()


def _network_plan(workload: Workload, gpu: configs.Device, training: bool, recompute: bool) -> plan.NetworkPlan | str:
    """The network path, as if the user asked for it: no table is consulted."""
    dtype, precision = ARITHMETIC[workload.dtype]
    strides = tuple((k, 1, 1) for k in workload.widths[:-1])
    activations = tuple(_activations(workload))
    return plan.network_path(workload.widths, strides, activations, dtype, precision, gpu, training, recompute)


def _activations(workload: Workload) -> list[Activation]:
    return [ACTIVATIONS[workload.activation]] * (len(workload.widths) - 2) + [ACTIVATIONS["identity"]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Tuner:
    """Measures tasks on a device, one after the other, within a time.

    Args:
        time: seconds that one call takes on the device.
        now: seconds of a clock that the time limit goes by.
        compilers: what compiles ahead.
        old: what was measured before.
        new: a table without rows, for what is measured now.

    Attributes:
        rows: what was measured.
        notes: what was left out and why, a sentence each.
        doing: what runs on the device, or ran last.
    """

    def __init__(
        self,
        device: torch.device,
        time: Clock,
        now: Callable[[], float],
        compilers: Compilers,
        old: tables.Table,
        new: tables.Table,
    ) -> None:
        self.gpu = configs.describe(device.type, device.index or 0)
        self.device = device
        self.time = time
        self.now = now
        self.compilers = compilers
        self.old = {row.key: row for row in old.gemms}
        self.tables = old, new
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.doing = ""
        self.deadline = math.inf

    @property
    def table(self) -> tables.Table:
        """All rows: what was measured now, and of what was there before the rest."""
        old, new = self.tables
        gemms = tuple(row for row in self.rows if isinstance(row, tables.Gemm))
        networks = tuple(row for row in self.rows if isinstance(row, tables.Network))
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
                with _float32_precision(task.precision):
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

    def _candidates(self, product: Product) -> tuple[configs.TileConfig, ...]:
        """What was the fastest before, then by the rule's estimate."""
        before = self.old.get(product.key)
        first = (before.tile,) if before and before.tile else ()
        return tuple(dict.fromkeys((*first, *layer_tiles.candidates(product.problem, self.gpu))))

    def _ask_ahead(self, tasks: Sequence[Task]) -> None:
        """Have compiled, in order, what every task should have measured; then what there may be time for."""
        works = [[TileWork(task, tile) for tile in self._candidates(task)] for task in tasks if type(task) is Product]
        few = [work for each in works for work in (each if each[0].task.anchor else each[:FEW])]
        self.compilers.ask({work.key: work for work in few})
        self._ask_paths(tasks)
        self.compilers.ask({work.key: work for each in works for work in each})

    def _ask_paths(self, tasks: Sequence[Task], table: tables.Table | None = None) -> None:
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

    def _product(self, product: Product, limit: float) -> tables.Gemm:
        operands = Operands(product, self.device)
        torch_ms = self._milliseconds(f"{product}, torch's own", operands.turns(operands.by_torch))
        expected = operands.in_float32()
        # Sums of k products in fp32, added in another order, differ by about sqrt(k) roundings.
        bound = BOUNDS[product.dtype][0] + math.sqrt(product.problem.k) * 2**-24
        best: tuple[float, configs.TileConfig] | None = None
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
        return tables.Gemm(*product.key, tile_of_best if faster else None, ms_of_best, torch_ms)

    def _network(self, whole: Whole) -> tables.Network:
        passes = Passes(whole, self.device)
        ms = {"torch": self._milliseconds(f"{whole}, torch's own", passes.turns(passes.by_torch))}
        # By torch in the same dtype: in float32 some pre-activations fall on the other side of relu's kink, which moves
        # gradients by 2 % against fp16 and 8 % against bf16, more than the bounds (7 layers on a CPU, torch 2.13). What
        # cuBLAS's partial sums lose in fp16 is below the bound: 0.8 % over 2^20 rows (H100, torch 2.11).
        expected = passes(passes.by_torch, 0)
        paths: dict[str, Callable[[Tensor], Tensor]] = {"layer": passes.by_layers}
        for name, path in network_paths(whole, self.gpu).items():
            paths[name] = functools.partial(passes.by_network, path)
        with _in_force(self.table):
            for name, run in paths.items():
                what = f"{whole}, {name}"
                right = functools.partial(passes, run, 0)
                if self._compiles(what, PathWork(whole, name), self.deadline) and self._is_right(
                    what, right, expected, *BOUNDS[whole.workload.dtype]
                ):
                    ms[name] = self._milliseconds(what, passes.turns(run))
        return tables.Network(*whole.key, min(ms, key=lambda name: ms[name]), ms)

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
            _synchronize(self.device)
            self.notes.append(f"{what} was left out: it fails: {type(error).__name__}: {first_line(error)}")
            return False
        for difference, bound in zip(differences, itertools.chain(bounds, itertools.repeat(bounds[-1]))):
            if not difference <= bound:  # NaN is no right answer
                self.notes.append(
                    f"{what} was left out: its result is not torch's (relative difference {difference:.2g})"
                )
                return False
        return True


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU. Raises RuntimeError where its context is broken, as after an illegal memory access."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _float32_precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _sets(device: torch.device, nbytes: int) -> int:
    """How many sets of operands of `nbytes` it takes to fill L2 twice, so that each comes from memory."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(2 * cache / nbytes)))


def _random(sets: int, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> list[Tensor]:
    """As many tensors, of normal numbers; each begins at a multiple of 512 bytes, as torch allocates."""
    size = math.prod(shape)
    numbers = torch.randn(sets, -(-size // 256) * 256, dtype=dtype, device=device).mul_(scale)
    return [each[:size].view(shape) for each in numbers]


BY_TORCH: dict[str, Callable[..., object]] = {
    "forward": forward_by_torch,
    "dgrad": dgrad_by_torch,
    "wgrad": wgrad_by_torch,
}
BY_KERNEL: dict[str, Callable[..., object]] = {"forward": layer_forward, "dgrad": dgrad, "wgrad": wgrad}


class Operands:
    """The tensors of a product, in several sets, and its two ways: by torch, by our kernel."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.kind = product.kind
        M, N, K = product.rows, product.width_out, product.width_in
        dtype, self.precision = ARITHMETIC[product.dtype]
        activation = ACTIVATIONS[product.activation]
        active, again = product.activation != "identity", activation.keeps_preactivation
        self.epilogue = () if self.kind == "wgrad" else (activation,)
        # Shape and scale of each operand: sums of about 1. None is not needed.
        wanted: list[tuple[tuple[int, ...], float] | None]
        if self.kind == "forward":  # x, W, b, h, z
            wanted = [((M, K), 1.0), ((N, K), K**-0.5), ((N,), 1.0), ((M, N), 1.0), ((M, N), 1.0) if again else None]
        elif self.kind == "dgrad":  # dz, W, saved, dx, h
            side = ((M, K), 1.0)
            wanted = [((M, N), 1.0), ((N, K), N**-0.5), side if active else None, side, side if again else None]
        else:  # dz, h, dW, db
            wanted = [((M, N), M**-0.5), ((M, K), 1.0), ((N, K), 1.0), ((N,), 1.0)]
        self.inputs = 2 if self.kind == "wgrad" else 3  # the first tensors of a set are read, the others written
        nbytes = sum(math.prod(each[0]) for each in wanted if each) * dtype.itemsize
        self.count = _sets(device, nbytes)
        made = [
            _random(self.count, *each[0], dtype=dtype, device=device, scale=each[1]) if each else [None] * self.count
            for each in wanted
        ]
        self.sets: list[Any] = list(zip(*made))

    def written(self, run: Callable[[int], object]) -> list[Tensor]:
        """What a way writes, into the first set; what it leaves as it was is NaN."""
        results = [tensor for tensor in self.sets[0][self.inputs :] if tensor is not None]
        for result in results:
            result.fill_(torch.nan)
        run(0)
        return results

    def in_float32(self) -> list[Tensor]:
        """The results of the first set by torch in float32, from the same operands.

        In 16 bits torch's own results may be the worse side: over 2^20 rows, cuBLAS rounds partial sums to fp16.
        """
        tensors = self.sets[0]
        inputs = [None if each is None else each.float() for each in tensors[: self.inputs]]
        results = [
            None if each is None else torch.empty_like(each, dtype=torch.float32) for each in tensors[self.inputs :]
        ]
        BY_TORCH[self.kind](*inputs, *results, *self.epilogue)
        return [each for each in results if each is not None]

    def by_torch(self, index: int) -> None:
        BY_TORCH[self.kind](*self.sets[index], *self.epilogue)

    def by_kernel(self, index: int, tile: configs.TileConfig) -> None:
        BY_KERNEL[self.kind](*self.sets[index], *self.epilogue, self.precision, tile)

    def turns(self, run: Callable[[int], object]) -> Callable[[], object]:
        """A call that takes the sets in turn."""
        indices = itertools.cycle(range(self.count))
        return lambda: run(next(indices))


class Passes:
    """A network's tensors, the input in several sets, and a pass through it by one path or another."""

    def __init__(self, whole: Whole, device: torch.device) -> None:
        work = whole.workload
        dtype, _ = ARITHMETIC[work.dtype]
        make = functools.partial(_random, dtype=dtype, device=device)
        self.dtype = dtype
        self.training = whole.training
        self.layers = [
            Layer(make(1, n, k, scale=k**-0.5)[0], make(1, n)[0], activation)
            for (k, n), activation in zip(itertools.pairwise(work.widths), _activations(work))
        ]
        self.weights, self.biases, self.activations, _ = zip(*self.layers)
        self.parameters = [*self.weights, *self.biases]
        for parameter in self.parameters:
            parameter.requires_grad_(self.training)
        nbytes = work.rows * (work.widths[0] + work.widths[-1]) * dtype.itemsize
        self.count = _sets(device, nbytes)
        self.xs = make(self.count, work.rows, work.widths[0])
        self.dys = make(self.count, work.rows, work.widths[-1], scale=work.rows**-0.5) if self.training else []

    def by_torch(self, x: Tensor) -> Tensor:
        return reference.mlp(x, self.weights, self.biases, self.activations)

    def by_layers(self, x: Tensor) -> Tensor:
        return run_layers(x, self.weights, self.biases, find_layers(x, self.layers, self.dtype, "auto"))

    def by_network(self, path: plan.NetworkPlan, x: Tensor) -> Tensor:
        return run_network(x, self.weights, self.biases, path)

    def __call__(self, path: Callable[[Tensor], Tensor], index: int) -> list[Tensor]:
        """y, and in training the parameters' gradients."""
        if not self.training:
            with torch.no_grad():
                return [path(self.xs[index])]
        y = path(self.xs[index])
        return [y.detach(), *torch.autograd.grad(y, self.parameters, self.dys[index])]

    def turns(self, path: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        """A call that takes the inputs in turn."""
        indices = itertools.cycle(range(self.count))
        return lambda: self(path, next(indices))


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
) -> tables.Table:
    """Measure what is asked for, and write it into a table, whole or not at all, beside what that holds already.

    Args:
        config: what to do.
        report: is given what a user wants to read, piece by piece.
        device: what to measure on; the current GPU by default.
        time: seconds of one call; the GPU's events by default.
        now: seconds of a clock that the time limit goes by.
        compilers: what compiles ahead; by default as many processes as this machine has room for.

    Raises:
        UserError: there is no GPU for the kernels, or it failed; the file cannot be written, or is no table of this
            device.
        KeyboardInterrupt: Ctrl-C; its text says what was written.
    """
    device = device or _gpu()
    gpu = configs.describe(device.type, device.index or 0)
    path = Path(config.out) if config.out is not None else tables.user_path(gpu.name)
    utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    empty = tables.Table(gpu.name, utc, versions(), arch=gpu.arch, multiprocessors=gpu.multiprocessors)
    old = _existing(path, empty, report)
    if compilers is None:
        on_gpu = device.type == "cuda"
        target = driver.active.get_current_target() if on_gpu else None
        compilers = Compilers(compile_ahead, gpu, target, count_workers() if on_gpu else 0)
    tuner = Tuner(device, time or EventClock(), now, compilers, old, empty)

    known: list[tuple[Any, ...]] = [*(row.key for row in old.gemms), *(row.key for row in old.networks)]
    asked = tasks(config.workloads, gpu, known)
    report(f"{len(asked)} problems on {gpu.name}, {config.minutes:g} minutes at the most, into {path}")

    def save() -> str:
        """Write what was measured so far; says so."""
        if not tuner.rows:
            return f"nothing was measured; {path} is as it was"
        try:
            tables.write(path, tuner.table)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {first_line(error)}; what was there before is as it was") from None
        _forget_tables()
        return f"{len(tuner.rows)} of {len(asked)} problems were measured, and are in {path}"

    def keep() -> None:
        """The same without a word: a kernel that hangs leaves a process no other end than being killed."""
        with contextlib.suppress(OSError):  # which `save` will tell of
            tables.write(path, tuner.table)

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
    return tables.read(path) if tuner.rows else old


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(
            "tuning measures a GPU, and there is none that torch can use; mlp-fused env says what was found"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reason = plan.why_not((), torch.float32, device, "triton", planned=False)
    if reason is not None:
        raise UserError(f"there are no kernels to tune: {reason}")
    if (reason := distorted()) is not None:
        raise UserError(reason)
    return device


def _existing(path: Path, empty: tables.Table, report: Callable[[str], None]) -> tables.Table:
    """What the file holds already and what still holds. Before minutes of measuring: whether it can be written."""
    try:
        old = tables.read(path)
    except FileNotFoundError:
        old = empty
    except ValueError as error:
        raise UserError(f"{error}, so it will not be overwritten; delete it, or name another with --out") from None
    if old.device != empty.device:
        raise UserError(f"{path} was measured on {old.device}, this is {empty.device}; name another file with --out")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {path.resolve().parent}: {error.strerror}") from None
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
        if isinstance(row, tables.Gemm):
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
