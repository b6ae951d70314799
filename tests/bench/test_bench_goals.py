"""The goals and their rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import (
    SMALL,
    copy_row,
    errors,
    gemm_row,
    make_cell,
    network_row,
)

from bench import bench_call, goals
from bench.problem import ANCHORS, GRID
from bench.rows import (
    CallRow,
    Copied,
    FailedRow,
    Kept,
    Memory,
    Row,
    Way,
    to_json,
)


def verdict(goal: goals.Goal, *rows: Row) -> str:
    return goal.judge(rows).split("  ")[0]


def test_every_goal_has_rows_in_the_grid() -> None:
    calls = [Row(id=f"call-{name}-{phase}") for name in bench_call.CASES for phase in bench_call.PHASES]
    rows = [Row(id=str(cell), device=device) for cell in GRID for device in cell.devices] + calls
    for goal in goals.GOALS:
        assert any(goal.concerns(row) for row in rows), goal.text
        assert verdict(goal, *rows) == "not measured"
    products = {cell.problem.widths for cell in GRID if goals.GOALS[0].concerns(Row(id=str(cell)))}
    assert products == {(4096, 16384), (16384, 4096), (1024, 4096), (4096, 1024)}
    # Each goal against max-autotune has an anchor, because only anchors are measured with max-autotune.
    compiled = [goal for goal in goals.GOALS if goals.COMPILED in goal.text]
    assert len(compiled) == 3
    assert all(any(goal.concerns(Row(id=name)) for name in ANCHORS) for goal in compiled)


def test_a_goal_is_judged_by_its_worst_row() -> None:
    goal = next(goal for goal in goals.GOALS if "seed" in goal.text)
    first, second, third = (replace(make_cell("seed-step"), problem=replace(SMALL, rows=rows)) for rows in (1, 2, 3))
    good, bad = network_row(first, 1.4), network_row(second, 1.2)
    assert verdict(goal, good) == "met"
    assert goal.judge([good, bad]).startswith("missed        ≥ 1.3    1.200")
    assert goal.judge([good, bad]).endswith(f"{second}, the worst of 2")
    assert verdict(goal, replace(bad, device="cpu")) == "not measured"
    broken = FailedRow.for_cell(third, "cuda", error="out of memory")
    assert goal.judge([good, broken]).endswith(f"{first}, 1 failed")
    assert verdict(goal, network_row(third, baselines={}, failures={"eager": "no"})) == "not measured"
    unfinished = FailedRow.for_cell(third, "cuda", error="stopped", unfinished=9.0, measured=network_row(third, 1.1))
    assert goal.judge([good, unfinished]).startswith("missed        ≥ 1.3    1.100")


def test_figures_of_goals() -> None:
    product, network = make_cell("gemm-dgrad"), make_cell("large-forward")
    assert goals.over_bare_product(gemm_row(product, 0.8)) == pytest.approx(1.25)
    ours_worse = errors((1.0, 3.0), (2.0, 2.0))
    assert goals.error_over_eager(gemm_row(product, errors=ours_worse)) == pytest.approx(1.5)
    assert goals.error_over_eager(gemm_row(product, errors=ours_worse, precision="tf32")) is None
    assert goals.over_eager_in_full_fp32(network_row(network, precision="tf32")) is None
    assert goals.over_eager_in_full_fp32(network_row(network, precision="ieee")) == 1.5
    held = Memory(Kept(1, 3), Kept(2, 3))
    assert goals.kept_ratio(network_row(network, memory=held)) == 0.5
    assert goals.call_us(CallRow(id="call-wide-inference", us=30.0, eager_us=20.0)) == 30.0
    figures = [goal.figure for goal in goals.GOALS]
    assert [figure(Row(id="any")) for figure in figures] == [None] * len(figures)


def test_the_share_of_rows_on_our_kernels() -> None:
    rows = [
        network_row(make_cell("narrow-step"), path="network"),
        network_row(make_cell("narrow-forward")),
        network_row(make_cell("odd-forward"), path="reference"),
        FailedRow.for_cell(
            make_cell("odd-training"), "cuda", error="wrong", measured=network_row(make_cell("odd-training"))
        ),
        network_row(make_cell("seed-step"), path="reference", device="cpu"),
        gemm_row(make_cell("gemm-dgrad")),
    ]
    assert goals.report(rows)[:2] == [
        "narrow: 2 of 2 rows run on our kernels",
        "odd: 0 of 2 rows run on our kernels, 1 failed",
    ]
    assert len(goals.report(rows)) == 2 + len(goals.GOALS)


@pytest.mark.parametrize(
    ("ms", "gbps", "link_share", "from_1_ms"), [(2.0, 45.0, 0.9, 0.8), (1.0, 45.0, None, 0.8), (0.1, 45.0, None, None)]
)
def test_figures_of_a_copy_row(ms: float, gbps: float, link_share: float | None, from_1_ms: float | None) -> None:
    copied = {"pinned_side_stream": Copied(ms, 0.01, gbps)}
    row = copy_row(make_cell("copy-copy"), copied, {"prefetched": ms / 0.8, "resident": ms / 2}, {})
    row = replace(row, throughput=replace(row.throughput, ways={"prefetched": Way(ms, ms, ms, 1.0, 0.8)}))
    assert goals.copy_over_link(row) == (link_share and pytest.approx(link_share))
    assert goals.overlap(row) == 0.8
    assert goals.overlap_from_a_millisecond(row) == from_1_ms
    assert goals.over_the_fastest(row) == 1.02


def test_the_rows_of_the_prefetchers_goal() -> None:
    (goal,) = (goal for goal in goals.GOALS if "seed at 1024 rows" in goal.text)
    concerned = [str(cell) for cell in GRID if goal.concerns(Row(id=str(cell)))]
    assert "copy-784x512x512x10-relu-fp32-m1024-copy" in concerned
    assert sum("m1048576" in name for name in concerned) == 8  # four widths in 32 and 16 bits
    assert len(concerned) == 10


def test_the_command_prints_the_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = network_row(make_cell("narrow-step"), path="network")
    content = {"rows": {row.id: to_json(row)}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert goals.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == goals.report([row])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not a file of results of bench/gpu.py"),
        ('{"format": "readings"}', "is not a file of results of bench/gpu.py"),
    ],
    ids=["missing", "not JSON", "published readings"],
)
def test_the_command_refuses_other_files(
    content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert goals.main([str(path)]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"{path} {sentence}\n")


def test_the_command_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        goals.main([])
    assert "RESULTS.json" in capsys.readouterr().err
