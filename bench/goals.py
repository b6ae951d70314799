"""The goals of the benches, written once, and the verdict of rows on them.

A goal is judged by the worst of its rows: with one over the bound it is missed. Rows measured on a CPU are of no goal.
`python -m bench.goals bench/results/<gpu>.json` prints the report of a file; `pytest bench --benchmark` and gpu.py end
with theirs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bench.rows import CallRow, CopyRow, FailedRow, GemmRow, NetworkRow, Row, from_json

OURS = ("network", "layer")  # the paths that run on our kernels


@dataclass(frozen=True)
class Goal:
    """`figure` of a row whose id matches one of `ids` is to be at least `bound`, or with `at_most` no more."""

    text: str
    bound: float
    ids: tuple[str, ...]
    figure: Callable[[Row], float | None]
    at_most: bool = False

    def concerns(self, row: Row) -> bool:
        return row.device != "cpu" and any(fnmatchcase(row.id, pattern) for pattern in self.ids)

    def judge(self, rows: Iterable[Row]) -> str:
        """One line: "met", "missed" or "not measured", the worst figure and its row."""
        rows = [row for row in rows if self.concerns(row)]
        figures = [(figure, row.id) for row in rows if (figure := self.figure(_measured(row))) is not None]
        failed = sum(isinstance(row, FailedRow) for row in rows)
        sign = "≤" if self.at_most else "≥"
        failures = f", {failed} failed" if failed else ""
        if not figures:
            return f"not measured  {sign} {self.bound:<5g}  {self.text}{failures}"
        worst, name = max(figures) if self.at_most else min(figures)
        met = worst <= self.bound if self.at_most else worst >= self.bound
        verdict = "met" if met else "missed"
        of = f"{name}, the worst of {len(figures)}" if len(figures) > 1 else name
        return f"{verdict:<12}  {sign} {self.bound:<5g}  {worst:.3f}  {self.text}: {of}{failures}"


def _measured(row: Row) -> Row:
    """The row itself; of one that failed, the part that was measured before."""
    return row.measured or row if isinstance(row, FailedRow) else row


def over(baseline: str) -> Callable[[Row], float | None]:
    """A baseline's time over ours."""

    def speedup(row: Row) -> float | None:
        found = row.baselines.get(baseline) if isinstance(row, NetworkRow) else None
        return None if found is None else found.speedup

    return speedup


def over_eager_in_full_fp32(row: Row) -> float | None:
    return over("eager")(row) if isinstance(row, NetworkRow) and row.ours.precision == "ieee" else None


def of_bare_product(row: Row) -> float | None:
    """Our device time over cuBLAS's for the product alone."""
    matmul = row.baselines.get("matmul") if isinstance(row, GemmRow) else None
    return None if matmul is None else 1 / matmul.kernel_speedup


def of_eagers_error(row: Row) -> float | None:
    """Our error against float64 over eager's, by the norm or of the worst entry, whichever is larger."""
    if not isinstance(row, GemmRow) or row.errors is None or row.ours.precision != "ieee":
        return None
    ours, eager = row.errors["ours"], row.errors["eager"]
    return max(ours.norm / eager.norm, ours.entry / eager.entry)


def kept_ratio(row: Row) -> float | None:
    return row.memory.kept_ratio if isinstance(row, NetworkRow) and row.memory is not None else None


def call_us(row: Row) -> float | None:
    return row.us if isinstance(row, CallRow) else None


def of_link(row: Row) -> float | None:
    """A pinned copy's rate over the link's, of inputs of 64 MiB and more: smaller ones are bound by latency."""
    if not isinstance(row, CopyRow):
        return None
    copied = row.copies["pinned_side_stream"]
    return 1e9 * copied.gbps / row.link.to_device if copied.nbytes >= 2**26 else None


def of_the_slower(row: Row) -> float | None:
    """max(copy, compute) over a step with DevicePrefetcher."""
    return row.throughput.ways["prefetched"].of_bound if isinstance(row, CopyRow) else None


def of_the_slower_from_a_millisecond(row: Row) -> float | None:
    """The same of steps of 1 ms and more: shorter ones are bound by launches."""
    return of_the_slower(row) if isinstance(row, CopyRow) and row.throughput.ways["prefetched"].ms >= 1 else None


def over_the_fastest(row: Row) -> float | None:
    """The time of the way that is advised over the fastest's."""
    return row.throughput.over_fastest if isinstance(row, CopyRow) else None


NETWORKS = ("seed-*", "narrow-*", "middle-*", "large-*", "odd-*")
COMPILED = "torch.compile(max-autotune)'s forward + backward over ours"

GOALS = (
    Goal(
        "bf16 forward kernels of the large networks over cuBLAS's bare product, device time",
        1.03,
        ("gemm-*4096*-bf16-*-layer_forward",),
        of_bare_product,
        at_most=True,
    ),
    Goal(f"{COMPILED}, large", 1.08, ("large-*-training",), over("compile_max_autotune")),
    Goal(f"{COMPILED}, middle, 512 wide", 1.4, ("middle-512x*-training",), over("compile_max_autotune")),
    Goal(f"{COMPILED}, middle, 1024 wide", 1.2, ("middle-1024x*-training",), over("compile_max_autotune")),
    Goal(
        "eager's time over ours, large in fp32 at torch's default precision",
        1.7,
        ("large-*-fp32-*-forward", "large-*-fp32-*-training"),
        over_eager_in_full_fp32,
    ),
    Goal(
        "error of the large networks' fp32 kernels over eager's, at torch's default precision",
        1.0,
        ("gemm-*4096*-fp32-*",),
        of_eagers_error,
        at_most=True,
    ),
    Goal("eager's time over ours, all networks", 0.98, NETWORKS, over("eager")),
    Goal("eager's time over ours, a step of the seed network", 1.3, ("seed-*-step",), over("eager")),
    Goal(
        "kept between forward and backward with gelu, over eager's",
        0.58,
        ("middle-*-gelu-*-training", "large-*-gelu-*-training"),
        kept_ratio,
        at_most=True,
    ),
    Goal(
        "kept between forward and backward with relu, over eager's",
        1.0,
        ("middle-*-relu-*-training",),
        kept_ratio,
        at_most=True,
    ),
    Goal("pinned copies over the link's ceiling, from 64 MiB on", 0.9, ("copy-*-copy",), of_link),
    Goal(
        "max(copy, compute) over a step with DevicePrefetcher, of seed at 1024 rows and of narrow at 2^20",
        0.95,
        ("copy-784x512x512x10-*-m1024-copy", "copy-*-m1048576-copy"),
        of_the_slower,
    ),
    Goal(
        "max(copy, compute) over a step with DevicePrefetcher, from 1 ms on",
        0.95,
        ("copy-*-copy",),
        of_the_slower_from_a_millisecond,
    ),
    Goal(
        "the way to bring the data that is advised over the fastest measured",
        1.1,
        ("copy-*-copy",),
        over_the_fastest,
        at_most=True,
    ),
    # Rows of bench_call.py, which pytest alone measures.
    Goal(
        "µs of the layer path's forward without its kernels",
        40,
        ("call-wide-inference", "call-wide-training-forward"),
        call_us,
        at_most=True,
    ),
    Goal(
        "µs of the layer path's forward + backward without its kernels",
        120,
        ("call-wide-training-backward",),
        call_us,
        at_most=True,
    ),
)


def report(rows: Iterable[Row]) -> list[str]:
    """Lines: of each family the share of rows on our kernels, and each goal with the measured figure."""
    rows = [row for row in rows if row.device != "cpu"]
    families: dict[str, list[NetworkRow | FailedRow]] = {}
    for row in rows:
        if isinstance(row, NetworkRow | FailedRow):
            families.setdefault(row.family, []).append(row)
    lines = []
    for family, members in families.items():
        ours = sum(isinstance(row, NetworkRow) and row.ours.path in OURS for row in members)
        failed = sum(isinstance(row, FailedRow) for row in members)
        failures = f", {failed} failed" if failed else ""
        lines.append(f"{family}: {ours} of {len(members)} rows run on our kernels{failures}")
    return [*lines, *(goal.judge(rows) for goal in GOALS)]


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    print(*report(map(from_json, rows.values())), sep="\n")
