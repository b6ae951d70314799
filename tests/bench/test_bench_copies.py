"""Copies to the device and loops with batches from the host, on a simulated host, device and link."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from stand_ins import (
    SMALL,
    HostAndDevice,
)

from bench.copies import WAYS, on_the_cpu, throughput, ways
from bench.network import Bench
from bench.problem import Problem
from mlp_fused.timing import Timed


@pytest.mark.parametrize(("copy", "work"), [(1e-3, 2e-3), (2e-3, 1e-3), (5e-6, 5e-6)], ids=["work", "copy", "launches"])
def test_throughput_is_compared_with_the_slower_of_copy_and_compute(copy: float, work: float) -> None:
    clock = HostAndDevice()

    def to_device(_: int) -> None:
        clock.copy(5 * copy, waits=True)
        clock.compute(work)

    def non_blocking(_: int) -> None:
        clock.copy(copy)
        clock.compute(work)

    def prefetched(_: int) -> None:
        clock.device = max(clock.device, clock.link)
        clock.copy(copy, aside=True)
        clock.compute(work)

    simulated = {"to_device": to_device, "non_blocking": non_blocking, "prefetched": prefetched}
    calls = {name: Timed(call) for name, call in simulated.items()} | {"resident": Timed(lambda _: clock.compute(work))}
    actual = throughput(calls, rows=1000, copy_ms=1e3 * copy, clock=clock)
    assert actual.cpu_ms is None
    assert actual.over_fastest <= 1.05 + 1e-9
    assert actual.advised == ("prefetched" if work > 2e-4 else actual.advised)
    assert actual.compute_ms == actual.ways["resident"].ms == pytest.approx(1e3 * max(work, 2e-4), rel=0.05)
    assert actual.bound_ms == max(actual.copy_ms, actual.compute_ms)
    for name, way in actual.ways.items():
        assert way.examples_per_s == pytest.approx(1e6 / way.ms)
        assert name == "resident" or way.bound_share == pytest.approx(actual.bound_ms / way.ms)
    if work > 2e-4:  # otherwise everything but the launches is hidden
        assert actual.ways["to_device"].ms == pytest.approx(1e3 * (5 * copy + work), rel=0.15)
        assert actual.ways["non_blocking"].ms == pytest.approx(1e3 * (copy + work), rel=0.15)
    share = actual.ways["prefetched"].bound_share
    assert share is not None
    assert share > 0.9
    assert actual.ways["resident"].bound_share is None


def test_the_ways_of_the_data_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    bench = Bench(SMALL, "cpu")
    calls = ways(bench)
    assert list(calls) == ["to_device", "non_blocking", "prefetched", "resident"]
    for name, timed in calls.items():
        assert len(timed(0)) == len(bench.parameters)
        assert (timed.drain is not None) == (name == "prefetched")
    with pytest.raises(AssertionError, match="prefetched copies a wrong batch"):
        ways(bench, lambda batches, device: (2 * x for x in batches))
    bench.model.register_forward_hook(lambda model, x, y: 2 * y)
    with pytest.raises(AssertionError, match="wrong against eager"):
        ways(bench)


@pytest.mark.parametrize(("cpu", "advised"), [(1e-4, "cpu"), (2e-3, "to_device")])
def test_the_advised_way_is_judged_by_a_second_reading(cpu: float, advised: str) -> None:
    """In the first reading all ways are equally fast. In the second, all but the simplest are twice as fast."""
    clock = HostAndDevice()
    calls = Counter[str]()

    def timed(name: str) -> Timed:
        def call(_: int) -> None:
            calls[name] += 1
            late = calls["resident"] > 0 and name != "to_device"
            clock.compute(5e-4 if late else 1e-3)

        return Timed(call)

    def on_the_cpu(_: int) -> None:
        clock.host += cpu

    actual = throughput({name: timed(name) for name in WAYS}, 1000, 1.0, Timed(on_the_cpu), clock)
    assert actual.advised == advised
    assert actual.cpu_ms == pytest.approx(1e3 * cpu)
    assert actual.over_fastest == pytest.approx(1 if advised == "cpu" else 2, rel=0.05)


@pytest.mark.parametrize(
    ("problem", "is_timed"), [(SMALL, True), (replace(SMALL, dtype="bf16"), False), (replace(SMALL, rows=10**7), False)]
)
def test_the_cpu_is_timed_for_small_fp32_steps_only(problem: Problem, is_timed: bool) -> None:
    bench = Bench(problem, "cpu") if is_timed else Bench(problem, "meta")
    timed = on_the_cpu(bench)
    assert (timed is not None) == is_timed
    if timed is not None:
        expected = torch.autograd.grad(bench.eager(bench.host), bench.parameters, bench.gradients[0])
        assert all(map(torch.equal, timed(0), expected))
