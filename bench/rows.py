"""The rows of a results file, a frozen dataclass for each kind, and their JSON.

    NetworkRow      FusedMLP in one phase, beside its baselines
    GemmRow         one kernel of the layer path by itself, beside its baselines
    CopyRow         the copy of an input, beside the kernels that compute on it
    FreshRow        seconds of a first call, in a process of its own
    FailedRow       a cell whose measurement failed or ran out of time
    TinycudannRow   FusedMLP beside tiny-cuda-nn
    CallRow         the Python of a call

All times named `ms` are medians in milliseconds (see mlp_fused/timing.py).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from bench.problem import Cell
from mlp_fused.timing import Ceilings, Link, Timing

# The parts of rows


@dataclass(frozen=True)
class Verified:
    """Largest relative errors against eager, and the bounds that they were held to, of outputs and of gradients."""

    output: float | None
    gradients: float | None
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Floor:
    """The work of a call, the rates at which the device did it, and the least time that it needs.

    Attributes:
        flops, bytes: by `mlp_fused.explain.work`, of the path that was taken; a step adds the loss's and Adam's bytes.
        seconds: the larger of FLOPs and bytes over the ceilings.
        bound: which of the two is the larger, "compute" or "memory".
        ratio: the device's time over `seconds`.
        ceilings: FLOP/s and bytes/s of a large product and a large copy in the same process.
    """

    flops: int
    bytes: int
    tflops: float
    gbps: float
    seconds: float
    bound: str
    ratio: float
    ceilings: Ceilings


@dataclass(frozen=True)
class NetworkPhase:
    """FusedMLP in one phase.

    Attributes:
        path, reason, precision: the path that it takes and why, and how fp32 is multiplied (from `explain`).
        sets: how many inputs were rotated.
        first_call_s: seconds of the first call, which compiles its kernels or loads them.
    """

    path: str
    reason: str
    precision: str
    sets: int
    verified: Verified
    first_call_s: float
    timing: Timing
    floor: Floor


@dataclass(frozen=True)
class Kernel:
    """One kernel with the tile that it ran with."""

    tile: str
    precision: str
    sets: int
    verified: Verified
    timing: Timing
    floor: Floor


@dataclass(frozen=True)
class Comparison:
    """A baseline.

    Attributes:
        speedup, kernel_speedup: its `ms` and `kernel_ms` over ours.
        compile_s: seconds of the first call of torch.compile's graph, even if an earlier phase made it. inductor's
            cache on disk is used as it is, and a warm one shortens this.
    """

    timing: Timing
    speedup: float
    kernel_speedup: float
    verified: Verified | None = None
    first_call_s: float | None = None
    compile_s: float | None = None


@dataclass(frozen=True)
class Kept:
    """Bytes that one side holds between forward and backward, output included, and its peak in both."""

    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Memory:
    """A forward and backward on a GPU, above what was allocated before."""

    ours: Kept
    eager: Kept

    @property
    def kept_ratio(self) -> float:
        """Our bytes over eager's."""
        return self.ours.kept_bytes / self.eager.kept_bytes

    @property
    def peak_ratio(self) -> float:
        """Our peak over eager's."""
        return self.ours.peak_bytes / self.eager.peak_bytes


@dataclass(frozen=True)
class Copied:
    """A copy to the device: by device events, and how long the host was held up; `gbps` is 1e9 bytes a second."""

    ms: float
    host_ms: float
    gbps: float

    @property
    def nbytes(self) -> float:
        """The bytes that it moved."""
        return 1e6 * self.gbps * self.ms


@dataclass(frozen=True)
class Way:
    """A forward and backward in a loop, on batches that come in one way (see `bench.copies.WAYS`).

    Attributes:
        low, high: quartiles of `ms`, the time of a batch.
        of_bound: the bound over `ms`; None for batches that are on the device already.
    """

    ms: float
    low: float
    high: float
    examples_per_s: float
    of_bound: float | None = None


@dataclass(frozen=True)
class Throughput:
    """A training loop that is fed from the host.

    Attributes:
        copy_ms, compute_ms: the pinned copy by itself; the loop on batches that are on the device.
        bound_ms: the larger of the two, the time of a loop that hides all of one behind the other.
        cpu_ms: a forward and backward on this CPU; None where it would take too long to be the fastest.
        advised: the way, or "cpu", that `mlp-fused transfer` would advise.
        over_fastest: the advised one's time over the fastest's, in a reading of its own for short steps.
    """

    ways: dict[str, Way]
    copy_ms: float
    compute_ms: float
    bound_ms: float
    cpu_ms: float | None
    advised: str
    over_fastest: float


@dataclass(frozen=True)
class GemmErrors:
    """Errors of a product against float64: by the norm, and of the worst entry (see `Gemm.errors`)."""

    norm: float
    entry: float


@dataclass(frozen=True)
class OurSide:
    """FusedMLP beside tiny-cuda-nn; `repeat_ms` is its time again after the other's, which shows the noise."""

    path: str
    reason: str
    verified: Verified
    first_call_s: float
    timing: Timing
    repeat_ms: float


@dataclass(frozen=True)
class TheirSide:
    """tiny-cuda-nn; `jit_fusion` says whether its JIT mode was on."""

    jit_fusion: bool
    verified: Verified
    first_call_s: float
    timing: Timing


# The rows

T = TypeVar("T", bound="CellRow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement: its id, and the device, "cpu" or "cuda"."""

    id: str
    device: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class CellRow(Row):
    """The measurement of a cell of the grid, whose fields it repeats.

    Attributes:
        seconds_spent: how long gpu.py took for the row.
    """

    family: str
    phase: str
    anchor: bool
    widths: tuple[int, ...]
    rows: int
    dtype: str
    activation: str
    layout: str
    seconds_spent: float | None = None

    @classmethod
    def of(cls: type[T], cell: Cell, device: str, **values: Any) -> T:
        """The row of a cell on a device, with the fields that were measured."""
        problem = cell.problem
        return cls(
            id=str(cell),
            device=device,
            family=cell.family,
            phase=cell.phase,
            anchor=cell.anchor,
            widths=problem.widths,
            rows=problem.rows,
            dtype=problem.dtype,
            activation=problem.activation,
            layout=problem.layout,
            **values,
        )


@dataclass(frozen=True, kw_only=True)
class TimedRow(CellRow):
    """A function of ours, timed beside its baselines.

    Attributes:
        baselines: by name.
        failures: the text of the error, by name of a baseline that failed.
        repeat_ms: our time again after the baselines, which shows the noise; None in an unfinished row.
    """

    ours: NetworkPhase | Kernel
    baselines: dict[str, Comparison]
    failures: dict[str, str] = field(default_factory=dict)
    repeat_ms: float | None = None

    @property
    def how(self) -> str:
        """The path of a network, the tile of a kernel."""
        return self.ours.path if isinstance(self.ours, NetworkPhase) else self.ours.tile


@dataclass(frozen=True, kw_only=True)
class NetworkRow(TimedRow):
    """FusedMLP in one phase, beside its baselines.

    Attributes:
        copies: the input's copies, by kind (see `bench.copies.copies`); None on a CPU.
        memory: of a training row on a GPU.
    """

    ours: NetworkPhase
    copies: dict[str, Copied] | None = None
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class GemmRow(TimedRow):
    """One kernel of the layer path by itself, beside "matmul", the bare product, and "eager", torch's whole way.

    Attributes:
        errors: in fp32, those of "ours" and of "eager".
    """

    ours: Kernel
    errors: dict[str, GemmErrors] | None = None


@dataclass(frozen=True, kw_only=True)
class CopyRow(CellRow):
    """The copy of an input to the device, beside the kernels that compute on it.

    Attributes:
        copies: by kind (see `bench.copies.copies`).
        link: what the link reaches with pinned memory.
        phases: FusedMLP in the phases of COPIED_PHASES, as far as they were measured.
    """

    copies: dict[str, Copied]
    link: Link
    throughput: Throughput
    phases: dict[str, NetworkPhase]


@dataclass(frozen=True, kw_only=True)
class FreshRow(CellRow):
    """Seconds by name, from a process of its own (see fresh.py).

    Attributes:
        seconds: for "cold" and "warm", with Triton's cache empty and filled; a lecture, which has no kernel of
            Triton's, has them for "any".
    """

    seconds: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class FailedRow(CellRow):
    """A cell whose measurement failed.

    Attributes:
        unfinished: the seconds that it was given, if it only needs more; it is measured again then.
        measured: what was measured before.
    """

    error: str
    unfinished: float | None = None
    measured: NetworkRow | GemmRow | CopyRow | None = None


@dataclass(frozen=True, kw_only=True)
class TinycudannRow(Row):
    """FusedMLP beside tiny-cuda-nn's FullyFusedMLP.

    Attributes:
        phase: "forward" (without gradients) or "training" (and gradients of the parameters).
        flops, bytes: by `mlp_fused.explain.work`, of the path that ours takes.
        speedup, kernel_speedup: tiny-cuda-nn's `ms` and `kernel_ms` over ours.
    """

    widths: tuple[int, ...]
    rows: int
    phase: str
    flops: int
    bytes: int
    ours: OurSide
    tinycudann: TheirSide
    speedup: float
    kernel_speedup: float


@dataclass(frozen=True, kw_only=True)
class CallRow(Row):
    """Microseconds of the Python of a call: ours, and eager's on layers one wide."""

    us: float
    eager_us: float


# JSON

KINDS: dict[str, type[Row]] = {
    "network": NetworkRow,
    "gemm": GemmRow,
    "copy": CopyRow,
    "fresh": FreshRow,
    "failed": FailedRow,
    "tinycudann": TinycudannRow,
}


class UnfitRowError(ValueError):
    """The JSON of a row has other fields than the dataclass; the text is one sentence."""


def to_json(row: Row) -> dict[str, Any]:
    """A row as plain values, with its kind."""
    plain: dict[str, Any] = _plain(row)
    return plain


def from_json(content: Mapping[str, Any]) -> Row:
    """The row in plain values.

    Raises:
        UnfitRowError: a field is missing, or unknown, or has a value of another type.
    """
    name = content.get("id", "without an id")
    try:
        return _row(content)
    except UnfitRowError as error:
        text = f"row {name}: {error}; it was written by another version of bench/rows.py, measure it again"
        raise UnfitRowError(text) from None


def _row(content: Mapping[str, Any]) -> Row:
    if str(content.get("id")).startswith("call-"):  # bench_call.py writes no kind, and more readings than a report has
        known = {field.name for field in fields(CallRow)}
        return _instance(CallRow, {name: value for name, value in content.items() if name in known})
    kind = content.get("kind")
    if kind not in KINDS:
        raise UnfitRowError(f"its kind is {kind!r}, which needs to be one of {', '.join(KINDS)}")
    return _instance(KINDS[kind], {name: value for name, value in content.items() if name != "kind"})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        kind = next(({"kind": name} for name, row in KINDS.items() if type(value) is row), {})
        return kind | {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


D = TypeVar("D")


def _instance(cls: type[D], content: Any) -> D:
    """The dataclass that has these fields."""
    if not isinstance(content, Mapping):
        raise UnfitRowError(f"{content!r} stands where {cls.__name__} needs its fields")
    hints = _hints(cls)  # type: ignore[arg-type]
    required = {field.name for field in fields(cls) if field.default is field.default_factory}  # type: ignore[arg-type]
    if missing := required - set(content):
        raise UnfitRowError(f"{cls.__name__} has no {', '.join(sorted(missing))}")
    if unknown := set(content) - set(hints):
        raise UnfitRowError(f"{cls.__name__} has a field {', '.join(sorted(unknown))}, which is unknown")
    return cls(**{name: _value(hints[name], value, f"{cls.__name__}.{name}") for name, value in content.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _value(hint: Any, value: Any, name: str) -> Any:
    """A value of a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        choices = [each for each in arguments if each is not type(None)]
        if value is None and len(choices) < len(arguments):
            return None
        if len(choices) > 1:  # rows, which have their kinds
            return _row(value)
        return _value(choices[0], value, name)
    if isinstance(hint, type) and is_dataclass(hint):
        return _instance(hint, value)
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(arguments[1], each, name) for key, each in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], each, name) for each in value)
    plain: Any = int | float if hint is float else hint
    if origin is None and isinstance(value, plain):
        return value
    raise UnfitRowError(f"{name} is {value!r}, which is of another type")
