"""Clocks: the time of a call, and the highest rates of this machine.

On a GPU a call is timed by device events. The result is two medians, in milliseconds:

    ms          the time of a call in a loop: calls are issued one after the other without waiting. Gaps between
                launches count
    kernel_ms   the device's time: the same calls wait in the queue behind a spinning kernel until all are issued, so
                the host's time does not count

They are equal where the device is slower than the host. Inputs are rotated (`rotation`), so that they come from memory
and not from the L2 cache. On a CPU the host's clock times whole calls, and the two numbers are equal.

`time_apart` times one call by both clocks: the device's events inside, the host's clock outside.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from .dtypes import DTYPES

__all__ = [
    "MAX_SETS",
    "SECONDS",
    "Ceilings",
    "Clock",
    "Link",
    "Measured",
    "Spread",
    "Timed",
    "Timing",
    "between_events",
    "cache_bytes",
    "ceilings",
    "clamp",
    "cycles_per_second",
    "link",
    "memory_ceiling",
    "quartiles",
    "rotation",
    "time_apart",
    "time_call",
    "time_host",
    "time_loop",
]

SECONDS = 0.1  # spent on one number
MAX_SETS = 1024


@dataclass(frozen=True)
class Timed:
    """A function to time.

    Attributes:
        call: the function; its argument is the number of an input set.
        setup: if given, it is called before each call with the same argument, and not timed.
        sets: the number of input sets.
        waits: True if a call returns only when the device is done, as a copy of pageable memory does. Such calls cannot
            be queued.
        drain: if given, it is called before a loop is timed, to use up work that was done ahead while the device was
            idle, as a prefetcher does.
    """

    call: Callable[[int], Any]
    setup: Callable[[int], Any] | None = None
    sets: int = 1
    waits: bool = False
    drain: Callable[[], Any] | None = None

    def prepare(self, i: int) -> None:
        if self.setup is not None:
            self.setup(i % self.sets)

    def __call__(self, i: int) -> Any:
        return self.call(i % self.sets)


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds; `quartiles` are those of `ms`, over `rounds` readings of `calls` calls each."""

    ms: float
    kernel_ms: float
    quartiles: tuple[float, float]
    rounds: int
    calls: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """A time in milliseconds: the median of some readings, and their quartiles `low` and `high`."""

    ms: float
    low: float
    high: float
    readings: int

    @classmethod
    def from_readings(cls, values: Iterable[float]) -> Spread:
        """The spread of readings in milliseconds, at least one."""
        values = list(values)
        low, median, high = quartiles(values)
        return cls(median, low, high, len(values))

    def __add__(self, other: Spread) -> Spread:
        """The sum of two spreads. Its quartiles are as wide as they can be, as if both calls were slow together."""
        readings = min(self.readings, other.readings)
        return Spread(self.ms + other.ms, self.low + other.low, self.high + other.high, readings)


@dataclass(frozen=True)
class Measured:
    """The time of one call by three clocks, in milliseconds. The device is idle before the call.

    Attributes:
        device: the time between device events around the call.
        host: the host's time from the call until the device is done.
        returned: the host's time until the call returns: the time that a clock without synchronization shows.
    """

    device: Spread
    host: Spread
    returned: Spread


@dataclass(frozen=True)
class Link:
    """The speed of the link between host and device with pinned memory, in bytes/s."""

    to_device: float
    to_host: float


@dataclass(frozen=True)
class Ceilings:
    """The speeds that the machine reaches: a large product (FLOP/s) and a large copy (bytes/s, read plus written)."""

    flops_per_second: float
    bytes_per_second: float


def clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, math.ceil(value)))


def rotation(nbytes: int, cache_bytes: int) -> int:
    """The number of input sets of `nbytes` bytes that fill the cache twice; at least 1 and at most MAX_SETS."""
    return clamp(2 * cache_bytes / max(nbytes, 1), 1, MAX_SETS)


def cache_bytes(device: str) -> int:
    """Bytes of the L2 cache. 0 on a CPU, where a loader has just written the batch, so that it is in the cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


class Clock:
    """The host's clock, and events on the current CUDA or ROCm GPU. Tests pass a simulated one."""

    def now(self) -> float:
        """The host's time, in seconds."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        torch.cuda.synchronize()

    def event(self) -> Any:
        """An event, recorded now in the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have passed."""
        elapsed: float = start.elapsed_time(end)
        return elapsed

    def spin(self, seconds: float) -> None:
        """Keep the device busy for this time."""
        torch.cuda._sleep(int(seconds * cycles_per_second()))


@lru_cache(maxsize=1)
def cycles_per_second() -> float:
    """The clock rate of the spinning kernel, in cycles per second."""
    cycles = 10_000_000
    torch.cuda._sleep(20 * cycles)  # a GPU that was idle takes a tenth of a second to reach its clock rate
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    seconds: float = 1e-3 * start.elapsed_time(end)
    return cycles / seconds


CLOCK = Clock()


def time_call(timed: Timed, device: str, seconds: float = SECONDS, clock: Clock = CLOCK) -> Timing:
    """Warm up, then time calls for about `seconds`: at least 5 readings, or 3 if one call takes ten times that long."""
    return time_cuda(timed, seconds, clock) if device == "cuda" else time_cpu(timed, seconds, clock)


def time_cpu(timed: Timed, seconds: float = SECONDS, clock: Clock = CLOCK) -> Timing:
    spread = time_host(timed, seconds, clock)
    return Timing(spread.ms, spread.ms, (spread.low, spread.high), spread.readings, 1)


def time_host(timed: Timed, seconds: float = SECONDS, clock: Clock = CLOCK) -> Spread:
    """Time whole calls by the host's clock, for work that the host does itself."""
    readings: list[float] = []
    begun = clock.now()
    for count in itertools.count():
        spent = clock.now() - begun
        if len(readings) >= 1000 or (len(readings) >= (3 if spent > 5 else 5) and spent > 2 * seconds):
            return Spread.from_readings(readings)
        timed.prepare(count)
        start = clock.now()
        timed(count)
        stop = clock.now()
        if count > 0:  # the first call is the warm-up
            readings.append(1e3 * (stop - start))
    raise AssertionError  # a count has no end


def time_cuda(timed: Timed, seconds: float = SECONDS, clock: Clock = CLOCK) -> Timing:
    issued, once = map(min, _one_by_one(timed, seconds / 2, clock))
    rounds, calls = _enough(timed, once, seconds)
    first, median, third = quartiles(between_events(timed, rounds, calls, clock=clock))
    kernel = median
    if issued > 0.5 * once:  # the host may be slower than the device; otherwise `median` is the device's time
        spun = between_events(timed, min(rounds, 20), calls, _cover(issued, calls), clock)
        kernel = min(median, quartiles(spun)[1])
    return Timing(median, kernel, (first, third), rounds, calls)


def time_apart(timed: Timed, seconds: float = SECONDS, clock: Clock = CLOCK) -> Measured:
    """Time a call by the device's clock and by the host's, for about `seconds`, with at least 5 readings of each."""
    returned, done = _one_by_one(timed, seconds / 2, clock, at_least=6)
    issued, once = statistics.median(returned[1:]), statistics.median(done[1:])  # the first call is the warm-up
    rounds, calls = _enough(timed, once, seconds / 2)
    spin = 0.0 if timed.waits else _cover(issued, calls)
    inside = between_events(timed, min(rounds, 20), 1 if timed.waits else calls, spin, clock)
    return Measured(
        Spread.from_readings(inside),
        Spread.from_readings(1e3 * reading for reading in done[1:]),
        Spread.from_readings(1e3 * reading for reading in returned[1:]),
    )


def time_loop(timed: Timed, seconds: float = SECONDS, clock: Clock = CLOCK) -> Spread:
    """The time of a call in a loop, as `Timing.ms`, with its spread."""
    _, once = map(min, _one_by_one(timed, seconds / 2, clock))
    if timed.drain is not None:
        timed.drain()
    return Spread.from_readings(between_events(timed, *_enough(timed, once, seconds), clock=clock))


def _enough(timed: Timed, once: float, seconds: float) -> tuple[int, int]:
    """(number of readings, calls in each), for a call that takes `once` seconds.

    A reading has several short calls, because the events take time too.
    """
    calls = 1 if timed.setup is not None else clamp(200e-6 / once, 1, 20)
    return clamp(seconds / (once * calls), 3 if once > 10 * seconds else 5, 100), calls


def _cover(issued: float, calls: int) -> float:
    """The seconds that the device has to spin while the host issues this many calls."""
    return 2 * issued * calls + 1e-4


def _one_by_one(timed: Timed, seconds: float, clock: Clock, at_least: int = 2) -> tuple[list[float], list[float]]:
    """(seconds until each call returns, seconds until it is done). The device is idle before each call."""
    returned: list[float] = []
    done: list[float] = []
    begun = clock.now()
    while len(done) < at_least or (len(done) < 1000 and clock.now() - begun < seconds):
        timed.prepare(len(done))
        clock.synchronize()
        start = clock.now()
        timed(len(done))
        returned.append(clock.now() - start)
        clock.synchronize()
        done.append(clock.now() - start)
    return returned, done


def between_events(timed: Timed, rounds: int, calls: int, spin: float = 0.0, clock: Clock = CLOCK) -> list[float]:
    """Milliseconds a call, one reading a round. In each round the device first spins for `spin` seconds."""
    readings = []
    for n in range(rounds):
        timed.prepare(n)
        if spin:
            clock.spin(spin)
        start = clock.event()
        for i in range(calls):
            timed(n * calls + i)
        readings.append((start, clock.event()))
    clock.synchronize()
    return [clock.elapsed_ms(start, end) / calls for start, end in readings]


@lru_cache(maxsize=8)
def ceilings(device: str, dtype: str) -> Ceilings:
    """The ceilings of a device, measured once in a process: torch's product of two random n x n matrices, and a copy.

    n is 8192 on a GPU and 1024 on a CPU; 256 on a CPU in 16 bits, because CPUs without 16-bit units are very slow.
    """
    n = 8192 if device == "cuda" else 1024 if dtype == "fp32" else 256
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    product = time_call(Timed(lambda _: a @ b), device, 0.2)
    return Ceilings(2 * n**3 / (1e-3 * product.ms), memory_ceiling(device))


@lru_cache(maxsize=16)
def memory_ceiling(device: str) -> float:
    """Bytes per second, read plus written, of a large copy within a device's memory; measured once in a process."""
    kind = torch.device(device).type
    source = torch.rand(2**28 if kind == "cuda" else 2**25, device=device)  # 1 GiB or 128 MiB
    target = torch.empty_like(source)
    copied = time_call(Timed(lambda _: target.copy_(source)), kind, 0.2)
    return 2 * source.nbytes / (1e-3 * copied.ms)


@lru_cache(maxsize=16)
def link(device: str) -> Link:
    """The link of the current GPU, by copies of 256 MiB of pinned memory; measured once in a process."""
    there = torch.rand(2**26, device=device)
    here = torch.empty_like(there, device="cpu", pin_memory=True)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        copied = time_apart(Timed(lambda _: target.copy_(source, non_blocking=True)), 0.2)
        return source.nbytes / (1e-3 * copied.device.ms)

    return Link(rate(there, here), rate(here, there))
