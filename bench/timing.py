"""Clocks: how long a call takes, and how fast this machine can be at all.

On a GPU a call is timed by device events. Two numbers come out, both medians, in milliseconds:

    ms          what a call costs in a loop: calls issued one after the other without waiting, launch gaps included
    kernel_ms   what the device works: the same calls queued up behind a spinning kernel, so that the host is out of it

They agree where the device is the slower of the two. Inputs are rotated (`rotation`) so that they come from memory and
not from the L2 that the last call left them in. On a CPU the host clock times whole calls, and the two are one number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mlp_fused.tuning import between_events, cycles_per_second

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS = 0.1  # spent on one number
MAX_SETS = 1024


@dataclass(frozen=True)
class Timed:
    """A function to be timed: `call(i)` on input set i of `sets`, after an untimed `setup(i)` where there is one."""

    call: Callable[[int], Any]
    setup: Callable[[int], Any] | None = None
    sets: int = 1

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
class Ceilings:
    """What the machine reaches: a large product (FLOP/s) and a large copy (bytes/s, read plus written)."""

    flops_per_second: float
    bytes_per_second: float


def clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, math.ceil(value)))


def rotation(nbytes: int, cache_bytes: int) -> int:
    """How many input sets of `nbytes` it takes to fill the cache twice, at least one and at most MAX_SETS."""
    return clamp(2 * cache_bytes / max(nbytes, 1), 1, MAX_SETS)


def cache_bytes(device: str) -> int:
    """Bytes of L2; 0 on a CPU, whose batch has just been made by the loader and lies in its cache in real use too."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def time_call(timed: Timed, device: str, seconds: float = SECONDS) -> Timing:
    """Warm up, then read about `seconds` worth of calls, at least five (three where one takes a second or more)."""
    return time_cuda(timed, seconds) if device == "cuda" else time_cpu(timed, seconds)


def time_cpu(timed: Timed, seconds: float = SECONDS) -> Timing:
    readings: list[float] = []
    begun = time.perf_counter()
    count = 0
    while len(readings) < 1000:
        spent = time.perf_counter() - begun
        if len(readings) >= (3 if spent > 5 else 5) and spent > 2 * seconds:
            break
        timed.prepare(count)
        start = time.perf_counter()
        timed(count)
        stop = time.perf_counter()
        count += 1
        if count > 1:  # the first call is the warm-up
            readings.append(1e3 * (stop - start))
    first, median, third = quartiles(readings)
    return Timing(median, median, (first, third), len(readings), 1)


def time_cuda(timed: Timed, seconds: float = SECONDS) -> Timing:
    issued, once = _warm_up(timed, seconds / 2)
    # Several short calls between two events, or the events themselves would be a good part of the reading.
    calls = 1 if timed.setup is not None else clamp(200e-6 / once, 1, 20)
    rounds = clamp(seconds / (once * calls), 3 if once > 1 else 5, 100)
    first, median, third = quartiles(_between_events(timed, rounds, calls))
    kernel = median
    if issued > 0.5 * once:  # the host may be the slower one; otherwise the queue never runs dry and ms is device time
        spin = int((2 * issued * calls + 1e-4) * cycles_per_second())
        kernel = min(median, quartiles(_between_events(timed, min(rounds, 20), calls, spin))[1])
    return Timing(median, kernel, (first, third), rounds, calls)


def _warm_up(timed: Timed, seconds: float) -> tuple[float, float]:
    """Seconds that the host takes to issue one call, and seconds until the call is done; smallest seen."""
    issued = once = math.inf
    begun = time.perf_counter()
    count = 0
    while count < 2 or (count < 1000 and time.perf_counter() - begun < seconds):
        timed.prepare(count)
        torch.cuda.synchronize()
        start = time.perf_counter()
        timed(count)
        issued = min(issued, time.perf_counter() - start)
        torch.cuda.synchronize()
        once = min(once, time.perf_counter() - start)
        count += 1
    return issued, once


def _between_events(timed: Timed, rounds: int, calls: int, spin: int = 0) -> list[float]:
    """Milliseconds a call, one reading a round; with `spin`, the device first spins that many cycles."""
    return [1e3 * seconds for seconds in between_events(timed, rounds, calls, spin, timed.prepare)]


@lru_cache(maxsize=8)
def ceilings(device: str, dtype: str) -> Ceilings:
    """Both ceilings, measured once a process: an n x n product of random numbers through torch, and a copy.

    n is 8192 on a GPU; on a CPU 1024, and 256 in 16 bits, which CPUs without 16-bit units multiply very slowly.
    """
    n = 8192 if device == "cuda" else 1024 if dtype == "fp32" else 256
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    product = time_call(Timed(lambda _: a @ b), device, 0.2)
    return Ceilings(2 * n**3 / (1e-3 * product.ms), _copy_ceiling(device))


@lru_cache(maxsize=2)
def _copy_ceiling(device: str) -> float:
    source = torch.rand(2**28 if device == "cuda" else 2**25, device=device)  # 1 GiB or 128 MiB
    target = torch.empty_like(source)
    copied = time_call(Timed(lambda _: target.copy_(source)), device, 0.2)
    return 2 * source.nbytes / (1e-3 * copied.ms)


def copies(x: Tensor, seconds: float = SECONDS) -> dict[str, dict[str, float]]:
    """Copies of as many bytes as x has from the host to the device, into memory that is already there.

    For each of pageable, pinned, and pinned + non_blocking on a side stream: `ms` between device events around the
    copy, `host_ms` for which the host was held up, and `gbps` (1e9 bytes a second).
    """
    pageable = x.cpu()
    pinned = pageable.pin_memory()
    target = torch.empty_like(pageable, device=x.device)
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    kinds = {
        "pageable": (pageable, here, False),
        "pinned": (pinned, here, False),
        "pinned_side_stream": (pinned, side, True),
    }
    found = {}
    for kind, (source, stream, non_blocking) in kinds.items():
        readings: list[tuple[float, float]] = []
        begun = time.perf_counter()
        while len(readings) < 4 or (len(readings) < 200 and time.perf_counter() - begun < seconds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                asked = time.perf_counter()
                start.record()
                target.copy_(source, non_blocking=non_blocking)
                end.record()
                returned = time.perf_counter()
            torch.cuda.synchronize()
            readings.append((start.elapsed_time(end), 1e3 * (returned - asked)))
        ms, host_ms = (statistics.median(column) for column in zip(*readings[1:], strict=True))
        found[kind] = {"ms": ms, "host_ms": host_ms, "gbps": 1e-6 * x.numel() * x.element_size() / ms}
    return found
