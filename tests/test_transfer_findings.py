"""The arithmetic of `mlp_fused.transfer`: crossings, bounds, advice, and the record as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_gpu import GB, Speeds, both, exact, simulate

from mlp_fused.timing import Link, Measured, Spread
from mlp_fused.transfer import findings
from mlp_fused.transfer.findings import Crossing, OnCpu, OnGpu, Point, Transfer, crossing, hidden


@given(st.floats(2, 5000), st.floats(-0.5, 0.9), st.floats(0.91, 2.0))
def test_the_crossing_of_two_power_laws_is_exact(rows: float, slope: float, steeper: float) -> None:
    sizes = [1, 7, 100, 6000]
    actual = crossing(
        sizes, [exact((size / rows) ** steeper) for size in sizes], [exact((size / rows) ** slope) for size in sizes]
    )
    assert actual.rows == pytest.approx(rows)
    assert actual.low == actual.high == actual.rows


def test_the_spread_gives_the_range_of_a_crossing() -> None:
    sizes = [1, 10, 100, 1000]
    cpu = [Spread(size, size / 1.2, size * 1.2, 9) for size in sizes]
    gpu = [Spread(50, 40, 60, 9)] * 4
    actual = crossing(sizes, cpu, gpu)
    assert actual == Crossing(pytest.approx(50), pytest.approx(40 / 1.2), pytest.approx(60 * 1.2), (1, 1000))
    assert str(actual) == "from about 50 rows on (33 to 72)"


@pytest.mark.parametrize(
    ("cpu", "rows", "text"),
    [
        ([2, 3], 0, "at every measured batch size, from 1 row on"),
        ([0.5, 1.0], math.inf, "at no measured batch size, up to 10 rows"),
        ([2, 0.5], math.inf, "at no measured batch size"),
    ],
    ids=["always", "never", "no longer"],
)
def test_a_crossing_outside_the_readings_is_not_extrapolated(cpu: list[float], rows: float, text: str) -> None:
    actual = crossing([1, 10], [exact(ms) for ms in cpu], [exact(1)] * 2)
    assert actual.rows == rows
    assert str(actual).startswith(text)


def test_a_crossing_outside_the_readings_states_the_range_of_the_spread() -> None:
    spread = [Spread(1.1, 0.9, 1.3, 9), Spread(20, 19, 21, 9)]
    actual = crossing([10, 1000], spread, [exact(1)] * 2)
    assert (actual.rows, actual.low) == (0, 0)
    perhaps = f"(by the quartiles, perhaps only from {actual.high:,.0f} on)"
    assert str(actual) == f"at every measured batch size, from 10 rows on {perhaps}"
    behind = [Spread(0.1, 0.05, 0.2, 9), Spread(0.9, 0.5, 1.2, 9)]
    actual = crossing([10, 1000], behind, [exact(1)] * 2)
    assert str(actual) == (
        f"at no measured batch size, up to 1,000 rows (by the quartiles, perhaps from {actual.low:,.0f} on)"
    )
    assert str(Crossing(0, 0, math.inf, (1, 2))).endswith("(by the quartiles, perhaps only at none)")
    assert str(Crossing(math.inf, 0, math.inf, (1, 2))).endswith("(by the quartiles, perhaps at every one)")


def test_the_gpu_wins_for_good_from_the_last_crossing_on() -> None:
    actual = crossing([1, 10, 100, 1000], [exact(ms) for ms in (2, 0.5, 0.5, 2)], [exact(1)] * 4)
    assert actual.rows == pytest.approx(math.sqrt(100 * 1000))


def test_ends_of_a_range_may_lie_outside_the_readings() -> None:
    cpu = [Spread(0.9, 0.5, 1.5, 9), Spread(1.1, 0.7, 1.6, 9)]
    actual = crossing([10, 1000], cpu, [exact(1)] * 2)
    assert (actual.low, actual.high) == (0, math.inf)
    assert str(actual).endswith("rows on (below the smallest to above the largest)")


@pytest.mark.parametrize(
    ("copied", "computed", "together", "part"),
    [(2, 3, 5, 0), (2, 3, 3, 1), (3, 2, 3, 1), (2, 3, 4, 0.5), (2, 3, 6, 0), (2, 3, 2.9, 1), (0, 3, 3, 1)],
)
def test_overlap(copied: float, computed: float, together: float, part: float) -> None:
    assert hidden(copied, computed, together) == pytest.approx(part)


def on_gpu(**changes: Any) -> OnGpu:
    """Times that lead to no advice, except for the changes."""
    usual = OnGpu(
        pageable=both(0.01),
        pinned=both(0.01),
        non_blocking=both(0.01),
        to_host=both(0.01),
        staging=exact(0.01),
        launch=both(0.01),
        forward=Measured(exact(4), exact(4.1), exact(0.2)),
        backward=Measured(exact(6), exact(6.1), exact(0.3)),
        resident=exact(10),
        step=exact(10.01),
        prefetched=exact(10),
        non_waiting=exact(10),
        narrowed=None,
    )
    return dataclasses.replace(usual, **changes)


def make_transfer(gpu: OnGpu | None, cpu_ms: float = 1000, **changes: Any) -> Transfer:
    cpu = OnCpu(exact(cpu_ms / 3), exact(2 * cpu_ms / 3), exact(cpu_ms))
    fast = None if gpu is None else on_gpu()
    points = tuple(Point(rows, 4 * rows, rows, (rows, rows), cpu, fast) for rows in (8, 16))
    point = Point(32, 128, 32, (32, 32), cpu, gpu)
    usual = Transfer("MLP", 32, True, "CPU", "GPU", Link(GB, GB), GB, None, (*points, point), ())
    return dataclasses.replace(usual, **changes)


def test_what_bounds_a_step() -> None:
    slow = Measured(exact(1), exact(20), exact(20))
    assert on_gpu().bound == "kernel"
    assert on_gpu(forward=slow).bound == "launch"
    assert on_gpu(non_blocking=both(30)).bound == "copy"
    assert on_gpu(backward=None).kernels == exact(4)
    copied = on_gpu(pageable=both(25), non_blocking=both(30), step=exact(50))
    assert make_transfer(copied).bounds == (
        "a step of 32 rows with x.to(device) takes 50 ms, of which the copy takes 25 ms (50%); with prefetching, the "
        "copy to the device bounds it: copy 30 ms, launch 500 µs, kernel 10 ms"
    )


ADVICE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "no advice: all but 0% of a step is the work of the network"),
    "stay": (
        {},
        {"cpu_ms": 2},
        "stay on the CPU at 32 rows: a step takes 2 ms there and 10 ms on the GPU, which is faster at no",
    ),
    "larger": (
        {"forward": Measured(exact(1), exact(20), exact(20)), "resident": exact(20), "step": exact(20)},
        {"points": ()},
        "take a larger batch: launching takes 20.3 ms, and the kernels only 7 ms; the kernels take longer ",
    ),
    "pin": (
        {"step": exact(12), "non_waiting": exact(11), "prefetched": exact(11.5)},
        {},
        "pin the batch (DataLoader's pin_memory=True) and copy it with non_blocking=True: a step takes 11 ms instead "
        "of 12 ms",
    ),
    "prefetch": (
        {"step": exact(14), "non_waiting": exact(13), "non_blocking": both(4), "prefetched": exact(11)},
        {},
        "prefetch with mlp_fused.DevicePrefetcher and a DataLoader with pin_memory=True: a step takes 11 ms instead of "
        "14 ms; 75% of the possible overlap is reached",
    ),
    "16 bits": (
        {"step": exact(30), "non_waiting": exact(25), "prefetched": exact(20), "narrowed": exact(12)},
        {},
        "store the data on the host in 16 bits, prefetch them, and convert them to float32 on the GPU or use "
        "torch.autocast: with half the bytes a step takes 12 ms instead of 20 ms",
    ),
    "keep": (
        {"step": exact(30), "non_waiting": exact(25), "prefetched": exact(20)},
        {},
        "keep the data on the GPU if they fit: a step then takes 10 ms instead of 20 ms",
    ),
}


@pytest.mark.parametrize(("gpu", "rest", "sentence"), ADVICE.values(), ids=ADVICE)
def test_advice_is_given_if_it_saves_time(gpu: dict[str, Any], rest: dict[str, Any], sentence: str) -> None:
    if "points" in rest:
        points = make_transfer(on_gpu(**gpu)).points[-1:]
        rest = {"points": points}
    advice = make_transfer(on_gpu(**gpu), **rest).advice
    assert any(line.startswith(sentence) for line in advice), advice
    begin = sentence.split()[0]
    assert begin == "no" or not any(line.startswith(begin) for line in make_transfer(on_gpu()).advice)


@pytest.mark.parametrize("narrowed", [None, exact(19.9)], ids=["none", "no faster"])
def test_16_bits_are_not_advised_if_not_faster(narrowed: Spread | None) -> None:
    gpu = on_gpu(step=exact(30), non_blocking=both(20), non_waiting=exact(25), prefetched=exact(20), narrowed=narrowed)
    assert not any("16 bits" in line for line in make_transfer(gpu).advice)


@given(*[st.floats(0.01, 1000)] * 4)
def test_the_choice_is_the_fastest_or_an_equal_simpler_one(
    cpu: float, step: float, pinned: float, ahead: float
) -> None:
    transfer = make_transfer(on_gpu(step=exact(step), non_waiting=exact(pinned), prefetched=exact(ahead)), cpu_ms=cpu)
    times = {"cpu": cpu, "step": step, "non_waiting": pinned, "prefetched": ahead}
    least = min(times.values())
    assert times[transfer.choice] <= (1 + findings.GAIN) * least
    simpler = list(times)[: list(times).index(transfer.choice)]
    assert all(times[name] > (1 + findings.GAIN) * least for name in simpler)
    begins = {"cpu": "stay on the CPU", "non_waiting": "pin the batch", "prefetched": "prefetch"}
    given_advice = any(line.startswith(begins.get(transfer.choice, "no such")) for line in transfer.advice)
    assert given_advice == (transfer.choice in begins)


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.0021, "2.1 µs"), (0.5, "500 µs"), (1, "1 ms"), (12.34, "12.3 ms"), (2500, "2.5 s"), (1.25e6, "1250 s")],
)
def test_times_are_written_with_three_digits(ms: float, text: str) -> None:
    assert findings._time(ms) == text


def test_the_table_has_every_part() -> None:
    text = str(simulate(Speeds()))
    for part in (
        "simulated",
        "context         300 ms",
        "first forward      4 s  kernels compiled",
        "50 ms  kernels loaded from Triton's cache",
        "copy to the device, pageable",
        "pinned, non_blocking",
        "copy of the output to the host",
        "launch of a kernel",
        "forward kernels",
        "backward kernels",
        "host copy into pinned memory",
        "step on the CPU",
        "ceilings: to the device 50.0 GB/s",
        "the forward takes ",
        "a step of 1,024 rows with x.to(device) takes ",
        "; with prefetching, the copy to the device bounds it: copy 81.9 µs",
        "pinned copy",
        "the GPU is faster than this CPU, with prefetching: ",
        "- prefetch with mlp_fused.DevicePrefetcher and",
        "not measured: a reason",
    ):
        assert part in text
    (pinned,) = (line for line in text.splitlines() if "pinned, non_blocking" in line)
    assert pinned.split()[-2:] == ["50.0", "100%"]
    assert max(map(len, text.splitlines())) < 200


def test_a_record_as_json() -> None:
    transfer = simulate(Speeds(link=1 * GB, pageable=0.5 * GB))
    record = json.loads(json.dumps(transfer.as_dict(), allow_nan=False))
    assert record["crossings"]["step"]["rows"] is None
    assert (record["bound"], record["choice"], record["bounds"]) == ("copy", "cpu", transfer.bounds)
    assert record["rates"]["pinned"] == pytest.approx([1.0, 1.0], rel=1e-2)
    assert set(record["rates"]) == {"pageable", "pinned", "non_blocking", "to_host", "forward", "backward"}
    assert record["points"][3]["gpu"]["pinned"]["host"]["ms"] == transfer.at_rows.gpu.pinned.host.ms  # type: ignore[union-attr]
    assert record["advice"] == transfer.advice
