"""Rows of every kind, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from stand_ins import VERIFIED, copy_row, errors, gemm_row, named_cell, network_row, timed

from bench.rows import (
    CallRow,
    Copied,
    FailedRow,
    FreshRow,
    Kept,
    Memory,
    OurSide,
    Row,
    TheirSide,
    TinycudannRow,
    UnfitRowError,
    from_json,
    to_json,
)

COPIED = {kind: Copied(1.0, 0.5, 40.0) for kind in ("pageable", "pinned", "pinned_side_stream")}
NETWORK = network_row(
    named_cell("odd-training"), copies=COPIED, memory=Memory(Kept(1, 2), Kept(2, 3)), seconds_spent=1.5
)
TINYCUDANN = TinycudannRow(
    id="tinycudann-small",
    widths=(5, 3),
    rows=4,
    phase="forward",
    flops=10,
    bytes=20,
    ours=OurSide("layer", "it fits", VERIFIED, 0.1, timing=timed(1.0), repeat_ms=1.0),
    tinycudann=TheirSide(False, VERIFIED, 0.1, timing=timed(2.0)),
    speedup=2.0,
    kernel_speedup=2.0,
)
ROWS: list[Row] = [
    NETWORK,
    network_row(named_cell("odd-step"), device="cpu", failures={"compile": "out of memory"}),
    gemm_row(named_cell("gemm-dgrad"), errors=errors((1e-7, 1e-6), (1e-7, 1e-6))),
    copy_row(named_cell("copy-copy"), COPIED, {"prefetched": 1.0, "resident": 0.5}, {"forward": 0.1}),
    FreshRow.for_cell(named_cell("copy-lecture"), "cuda", seconds={"any": {"copy": 0.1}}),
    FailedRow.for_cell(named_cell("odd-step"), "cuda", error="stopped after 9 s", unfinished=9.0, measured=NETWORK),
    FailedRow.for_cell(named_cell("odd-step"), "cuda", error="wrong"),
    TINYCUDANN,
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_row_round_trips_through_json(row: Row) -> None:
    assert from_json(json.loads(json.dumps(to_json(row)))) == row


def test_a_call_row_is_read_from_the_output_of_its_bench() -> None:
    written = {"id": "call-wide-inference", "us": 30.0, "us_spread": 1.0, "eager_us": 20.0, "ratio": 0.7}
    assert from_json(written) == CallRow(id="call-wide-inference", us=30.0, eager_us=20.0)


def changed(*path: str, **values: Any) -> dict[str, Any]:
    """A network's row with changed values in one part. None removes a field."""
    content = json.loads(json.dumps(to_json(NETWORK)))
    part = content
    for name in path:
        part = part[name]
    part.update(values)
    for name in [name for name, value in values.items() if value is None]:
        del part[name]
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (changed("ours", "timing", kernel_ms=None), "Timing has no kernel_ms"),
        (changed("ours", speed=1.0), "NetworkPhase has an unknown field speed"),
        (changed("ours", path=None, reason=None), "NetworkPhase has no path, reason"),
        (changed(rows="many"), "NetworkRow.rows is 'many', which has the wrong type"),
        (changed("baselines", eager=3.0), "Comparison is 3.0; it needs to be a mapping with its fields"),
        (changed(kind="other"), "its kind is 'other'; it needs to be one of network, gemm, copy, fresh, failed"),
        (changed(kind=None), "its kind is None; it needs to be one of"),
    ],
    ids=["missing", "unknown", "two missing", "another type", "no part", "another kind", "no kind"],
)
def test_a_row_with_other_fields_is_refused_in_one_sentence(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnfitRowError) as failure:
        from_json(content)
    assert str(failure.value).startswith(f"row {NETWORK.id}: {reason}")
    assert str(failure.value).endswith("; another version of bench/rows.py wrote it, so measure it again")
