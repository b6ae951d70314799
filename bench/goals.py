"""The goals of the benches, and the report on whether measured rows meet them.

A goal is met if its worst row is within the bound. Rows of a CPU do not count. `python -m bench.goals
bench/results/<gpu>.json` prints the report of a file. `pytest bench --benchmark` and gpu.py print it at their end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bench.rows import CallRow, CopyRow, FailedRow, GemmRow, NetworkRow, Row, from_json

OURS = ("network", "layer")  # the paths that run on the kernels


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of some rows.

    Attributes:
        text: a description of the figure.
        bound: the minimum of the figure, or its maximum with `at_most`.
        ids: the patterns of the ids of rows.
        figure: a function that returns the figure of a row, or None.
        at_most: True if `bound` is the maximum.
    """

    text: str
    bound: float
    ids: tuple[str, ...]
    figure: Callable[[Row], float | None]
    at_most: bool = False

    def concerns(self, row: Row) -> bool:
        """True if the goal applies to this row."""
        return row.device != "cpu" and any(fnmatchcase(row.id, pattern) for pattern in self.ids)

    def judge(self, rows: Iterable[Row]) -> str:
        """Return one line: "met", "missed" or "not measured", with the worst figure and its row."""
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
        source = f"{name}, the worst of {len(figures)}" if len(figures) > 1 else name
        return f"{verdict:<12}  {sign} {self.bound:<5g}  {worst:.3f}  {self.text}: {source}{failures}"


def _measured(row: Row) -> Row:
    """Return the row, or the part of a failed row that was measured before it failed."""
    return row.measured or row if isinstance(row, FailedRow) else row


def over(baseline: str) -> Callable[[Row], float | None]:
    """Return a figure: a baseline's time / ours."""

    def speedup(row: Row) -> float | None:
        side = row.baselines.get(baseline) if isinstance(row, NetworkRow) else None
        return None if side is None else side.speedup

    return speedup


def over_eager_in_full_fp32(row: Row) -> float | None:
    """Eager's time / ours, for rows in full fp32 accuracy."""
    return over("eager")(row) if isinstance(row, NetworkRow) and row.ours.precision == "ieee" else None


def over_bare_product(row: Row) -> float | None:
    """Our device time / the device time of cuBLAS's bare product."""
    matmul = row.baselines.get("matmul") if isinstance(row, GemmRow) else None
    return None if matmul is None else 1 / matmul.kernel_speedup


def error_over_eager(row: Row) -> float | None:
    """Our error against float64 / eager's error: the larger ratio of `norm` and `entry`."""
    if not isinstance(row, GemmRow) or row.errors is None or row.ours.precision != "ieee":
        return None
    ours, eager = row.errors["ours"], row.errors["eager"]
    return max(ours.norm / eager.norm, ours.entry / eager.entry)


def kept_ratio(row: Row) -> float | None:
    """Our bytes saved for backward / eager's."""
    return row.memory.kept_ratio if isinstance(row, NetworkRow) and row.memory is not None else None


def call_us(row: Row) -> float | None:
    """The Python overhead of a call in microseconds."""
    return row.us if isinstance(row, CallRow) else None


def copy_over_link(row: Row) -> float | None:
    """The rate of a pinned copy / the rate of the link, from 64 MiB on. Smaller copies are bound by latency."""
    if not isinstance(row, CopyRow):
        return None
    copied = row.copies["pinned_side_stream"]
    return 1e9 * copied.gbps / row.link.to_device if copied.nbytes >= 2**26 else None


def overlap(row: Row) -> float | None:
    """max(copy, compute) / the time of a step with DevicePrefetcher."""
    return row.throughput.ways["prefetched"].bound_share if isinstance(row, CopyRow) else None


def overlap_from_a_millisecond(row: Row) -> float | None:
    """`overlap` for steps of 1 ms and more. Shorter steps are bound by launches."""
    return overlap(row) if isinstance(row, CopyRow) and row.throughput.ways["prefetched"].ms >= 1 else None


def over_the_fastest(row: Row) -> float | None:
    """The time of the advised way to copy batches / the time of the fastest."""
    return row.throughput.over_fastest if isinstance(row, CopyRow) else None


NETWORKS = ("seed-*", "narrow-*", "middle-*", "large-*", "odd-*")
COMPILED = "forward + backward of torch.compile(max-autotune) / ours"

GOALS = (
    Goal(
        "bf16 forward kernels of large networks / cuBLAS's bare product, device time",
        1.03,
        ("gemm-*4096*-bf16-*-layer_forward",),
        over_bare_product,
        at_most=True,
    ),
    Goal(f"{COMPILED}, large", 1.08, ("large-*-training",), over("compile_max_autotune")),
    Goal(f"{COMPILED}, middle, 512 wide", 1.4, ("middle-512x*-training",), over("compile_max_autotune")),
    Goal(f"{COMPILED}, middle, 1024 wide", 1.2, ("middle-1024x*-training",), over("compile_max_autotune")),
    Goal(
        "eager's time / ours, large in fp32 at PyTorch's default precision",
        1.7,
        ("large-*-fp32-*-forward", "large-*-fp32-*-training"),
        over_eager_in_full_fp32,
    ),
    Goal(
        "error of fp32 kernels of large networks / eager's, at PyTorch's default precision",
        1.0,
        ("gemm-*4096*-fp32-*",),
        error_over_eager,
        at_most=True,
    ),
    Goal("eager's time / ours, all networks", 0.98, NETWORKS, over("eager")),
    Goal("eager's time / ours, a step of the seed network", 1.3, ("seed-*-step",), over("eager")),
    Goal(
        "bytes saved for backward with gelu / eager's",
        0.58,
        ("middle-*-gelu-*-training", "large-*-gelu-*-training"),
        kept_ratio,
        at_most=True,
    ),
    Goal(
        "bytes saved for backward with relu / eager's",
        1.0,
        ("middle-*-relu-*-training",),
        kept_ratio,
        at_most=True,
    ),
    Goal("rate of pinned copies / rate of the link, from 64 MiB on", 0.9, ("copy-*-copy",), copy_over_link),
    Goal(
        "max(copy, compute) / a step with DevicePrefetcher, seed at 1024 rows and narrow at 2^20",
        0.95,
        ("copy-784x512x512x10-*-m1024-copy", "copy-*-m1048576-copy"),
        overlap,
    ),
    Goal(
        "max(copy, compute) / a step with DevicePrefetcher, from 1 ms on",
        0.95,
        ("copy-*-copy",),
        overlap_from_a_millisecond,
    ),
    Goal(
        "the advised way to copy batches / the fastest way",
        1.1,
        ("copy-*-copy",),
        over_the_fastest,
        at_most=True,
    ),
    # Rows of bench_call.py, which only pytest measures.
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
    """Return lines with the rows on our kernels in each family, and with each goal and its measured figure."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="report which goals the rows of a file of results meet")
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="a file that bench/gpu.py wrote")
    path = parser.parse_args(arguments).results
    try:
        rows = [from_json(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"].values()]
    except OSError as error:
        print(f"{path} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{path} is not a file of results of bench/gpu.py", file=sys.stderr)
        return 2
    print(*report(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
