"""The rows of a results file: a frozen dataclass for each kind, and their JSON.

    NetworkRow      FusedMLP in one phase, and its baselines
    GemmRow         one kernel of the layer path, and its baselines
    CopyRow         the copy of an input, and the kernels that compute on it
    FreshRow        seconds of first calls, in a new process
    FailedRow       a cell whose measurement failed or ran out of time
    TinycudannRow   FusedMLP and tiny-cuda-nn
    CallRow         the Python overhead of a call

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
    """The largest relative errors of outputs and of gradients against eager, and the bounds on both."""

    output: float | None
    gradients: float | None
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Floor:
    """The work of a call, the rates that the device reached, and the shortest time that the work allows.

    Attributes:
        flops, bytes: the work of the path, by `mlp_fused.explain.work`; a step includes the bytes of the loss and Adam.
        tflops, gbps: the rates that were reached, in 1e12 FLOP/s and 1e9 bytes/s.
        seconds: the floor, max(flops / (FLOP/s), bytes / (bytes/s)) with the rates in `ceilings`.
        bound: "compute" if FLOPs decide the floor, "memory" if bytes do.
        ratio: the device time / `seconds`.
        ceilings: FLOP/s of a large product and bytes/s of a large copy, in the same process.
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
        path, reason, precision: the path, the reason for it, and the precision of fp32 products, by `explain`.
        sets: the number of inputs through which the calls cycled.
        verified: the errors against eager.
        first_call_s: seconds of the first call, which compiles or loads the kernels.
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
    """One kernel, with its tile."""

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
        speedup, kernel_speedup: its `ms` / ours, and its `kernel_ms` / ours.
        compile_s: seconds of the first call of torch.compile's graph, also if an earlier phase compiled it. A filled
            inductor cache on disk makes this shorter.
    """

    timing: Timing
    speedup: float
    kernel_speedup: float
    verified: Verified | None = None
    first_call_s: float | None = None
    compile_s: float | None = None


@dataclass(frozen=True)
class Kept:
    """The bytes allocated between forward and backward, including the output, and the peak over both."""

    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Memory:
    """The memory of a forward and backward on a GPU, beyond the memory allocated before."""

    ours: Kept
    eager: Kept

    @property
    def kept_ratio(self) -> float:
        """Our `kept_bytes` / eager's."""
        return self.ours.kept_bytes / self.eager.kept_bytes

    @property
    def peak_ratio(self) -> float:
        """Our `peak_bytes` / eager's."""
        return self.ours.peak_bytes / self.eager.peak_bytes


@dataclass(frozen=True)
class Copied:
    """A copy to the device.

    Attributes:
        ms: the time between events on the device.
        host_ms: the time until the call returns.
        gbps: the rate in 1e9 bytes/s.
    """

    ms: float
    host_ms: float
    gbps: float

    @property
    def nbytes(self) -> float:
        """The bytes of the copied tensor."""
        return 1e6 * self.gbps * self.ms


@dataclass(frozen=True)
class Way:
    """A loop of forward and backward, with one way to copy batches (see `bench.copies.WAYS`).

    Attributes:
        ms: the time of a batch.
        low, high: the quartiles of `ms`.
        examples_per_s: rows per second.
        bound_share: `bound_ms` / `ms`; None for batches that are already on the device.
    """

    ms: float
    low: float
    high: float
    examples_per_s: float
    bound_share: float | None = None


@dataclass(frozen=True)
class Throughput:
    """A training loop with batches from the host.

    Attributes:
        ways: the loop with each way to copy batches.
        copy_ms: the time of the pinned copy alone.
        compute_ms: the time of the loop with batches that are already on the device.
        bound_ms: max(copy_ms, compute_ms), the time of a loop with perfect overlap.
        cpu_ms: the time of a forward and backward on the CPU; None if it is too slow to be measured.
        advised: the way that `mlp-fused transfer` would advise, or "cpu".
        over_fastest: the time of the advised way / the time of the fastest. For short steps, from a second reading.
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
    """Errors of a product against float64: of the norm, and of the worst entry (see `Gemm.errors`)."""

    norm: float
    entry: float


@dataclass(frozen=True)
class OurSide:
    """FusedMLP in a comparison with tiny-cuda-nn. `repeat_ms` is its time, measured again at the end, for the noise."""

    path: str
    reason: str
    verified: Verified
    first_call_s: float
    timing: Timing
    repeat_ms: float


@dataclass(frozen=True)
class TheirSide:
    """tiny-cuda-nn. `jit_fusion` is True if its JIT fusion was on."""

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
    """The measurement of a cell of the grid, with the fields of the cell.

    Attributes:
        seconds_spent: the seconds that gpu.py needed for the row.
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
    def for_cell(cls: type[T], cell: Cell, device: str, **values: Any) -> T:
        """Make the row of a cell on a device. `values` are the measured fields."""
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
    """A call of ours and its baselines.

    Attributes:
        ours: our measurement.
        baselines: the comparisons, by the name of the baseline.
        failures: the error texts of failed baselines, by name.
        repeat_ms: our time, measured again after the baselines, for the noise; None in an unfinished row.
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
    """FusedMLP in one phase, and its baselines.

    Attributes:
        copies: the copies of the input, by name (see `bench.copies.copies`); None on a CPU.
        memory: the memory of a training row on a GPU, else None.
    """

    ours: NetworkPhase
    copies: dict[str, Copied] | None = None
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class GemmRow(TimedRow):
    """One kernel of the layer path. Its baselines are "matmul", the bare product, and "eager", PyTorch's operations.

    Attributes:
        errors: for fp32, the errors of "ours" and of "eager".
    """

    ours: Kernel
    errors: dict[str, GemmErrors] | None = None


@dataclass(frozen=True, kw_only=True)
class CopyRow(CellRow):
    """The copy of an input to the device, and the kernels that compute on it.

    Attributes:
        copies: the copies, by name (see `bench.copies.copies`).
        link: the measured rates of the link with pinned memory.
        throughput: training loops with batches from the host.
        phases: FusedMLP in the phases of COPIED_PHASES that were measured.
    """

    copies: dict[str, Copied]
    link: Link
    throughput: Throughput
    phases: dict[str, NetworkPhase]


@dataclass(frozen=True, kw_only=True)
class FreshRow(CellRow):
    """Seconds of first calls in a new process (see fresh.py).

    Attributes:
        seconds: seconds by name, for an empty ("cold") and a filled ("warm") Triton cache. The lecture, which has no
            Triton kernel, has only "any".
    """

    seconds: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class FailedRow(CellRow):
    """A cell whose measurement failed.

    Attributes:
        error: the text of the error.
        unfinished: the seconds after which it was stopped, if it only needs more time. It is then measured again.
        measured: the part that was measured before.
    """

    error: str
    unfinished: float | None = None
    measured: NetworkRow | GemmRow | CopyRow | None = None


@dataclass(frozen=True, kw_only=True)
class TinycudannRow(Row):
    """FusedMLP and tiny-cuda-nn's FullyFusedMLP.

    Attributes:
        phase: "forward" (without gradients) or "training" (with the gradients of the parameters).
        flops, bytes: the work of our path, by `mlp_fused.explain.work`.
        speedup, kernel_speedup: tiny-cuda-nn's `ms` / ours, and its `kernel_ms` / ours.
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
    """Microseconds of Python overhead of a call: ours, and eager's with layers of width 1."""

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
    """The JSON of a row does not have the fields of its dataclass. The message is one sentence."""


def to_json(row: Row) -> dict[str, Any]:
    """Convert a row to plain values, with its kind."""
    plain: dict[str, Any] = _plain(row)
    return plain


def from_json(content: Mapping[str, Any]) -> Row:
    """Make a row from plain values.

    Raises:
        UnfitRowError: a field is missing, unknown, or has the wrong type.
    """
    name = content.get("id", "without an id")
    try:
        return _row(content)
    except UnfitRowError as error:
        text = f"row {name}: {error}; another version of bench/rows.py wrote it, so measure it again"
        raise UnfitRowError(text) from None


def _row(content: Mapping[str, Any]) -> Row:
    if str(content.get("id")).startswith("call-"):  # bench_call.py writes no kind, and more fields than a CallRow has
        known = {field.name for field in fields(CallRow)}
        return _instance(CallRow, {name: value for name, value in content.items() if name in known})
    kind = content.get("kind")
    if kind not in KINDS:
        raise UnfitRowError(f"its kind is {kind!r}; it needs to be one of {', '.join(KINDS)}")
    return _instance(KINDS[kind], {name: value for name, value in content.items() if name != "kind"})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        kind = next(({"kind": name} for name, row in KINDS.items() if type(value) is row), {})
        return kind | {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


D = TypeVar("D")


def _instance(cls: type[D], content: Any) -> D:
    """Make a dataclass from the plain values of its fields."""
    if not isinstance(content, Mapping):
        raise UnfitRowError(f"{cls.__name__} is {content!r}; it needs to be a mapping with its fields")
    hints = _hints(cls)  # type: ignore[arg-type]
    required = {field.name for field in fields(cls) if field.default is field.default_factory}  # type: ignore[arg-type]
    if missing := required - set(content):
        raise UnfitRowError(f"{cls.__name__} has no {', '.join(sorted(missing))}")
    if unknown := set(content) - set(hints):
        raise UnfitRowError(f"{cls.__name__} has an unknown field {', '.join(sorted(unknown))}")
    return cls(**{name: _value(hints[name], value, f"{cls.__name__}.{name}") for name, value in content.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _value(hint: Any, value: Any, name: str) -> Any:
    """Convert plain values to the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        choices = [argument for argument in arguments if argument is not type(None)]
        if value is None and len(choices) < len(arguments):
            return None
        if len(choices) > 1:  # only unions of rows have several choices
            return _row(value)
        return _value(choices[0], value, name)
    if isinstance(hint, type) and is_dataclass(hint):
        return _instance(hint, value)
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(arguments[1], item, name) for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], item, name) for item in value)
    plain: Any = int | float if hint is float else hint
    if origin is None and isinstance(value, plain):
        return value
    raise UnfitRowError(f"{name} is {value!r}, which has the wrong type")
