"""Fit the rates of the estimate to a measured table, or to readings: `python -m bench.fit kernels/tuned/<gpu>.json`.

The estimate is seconds = Σ rate · term for each row (kernels/estimate.py). The fit minimizes the squared relative
errors, with three constraints: no rate is negative, the rate of a multiplying unit is at least its value in `FLOORS`,
and rates that the readings do not determine stay near `EXPECTED`. If a row has no tile, because PyTorch was faster, its
time counts for the tile with the shortest estimated time. A file of readings (`mlp-fused tune --readings`) has a row
for every tile. The command prints the rates and their errors, and writes kernels/rates.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlp_fused.engine import table_files
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import DEVICES, Device
from mlp_fused.kernels.estimate import (
    RATES_FILE,
    Rates,
    kernel_seconds,
    kernel_terms,
    operand_bits,
    torch_seconds,
    torch_terms,
)

Row = table_files.Gemm
Terms = dict[str, float]

KINDS = ("forward", "dgrad", "wgrad")
PULL = 0.01  # the weight of the distance from EXPECTED, relative to the mean squared relative error
ROUNDS = 3  # the number of fits; before each, tiles are chosen for the rows without one


def _same(value: float, name: str, *kinds: str) -> Terms:
    """Return the same rate for several kinds of products."""
    return {f"{kind} {name}": value for kind in kinds}


EXPECTED: dict[str, Terms] = {
    "kernel": {
        **_same(1.0, "launch", *KINDS),
        **_same(1.0, "memory", *KINDS),
        **_same(0.3, "piecewise", "forward", "dgrad"),
        **_same(1.0, "transcendental", "forward", "dgrad"),
        **_same(0.3, "unaligned", *KINDS),
        "L2": 0.4,
        "block": 1.0,
        "tile": 0.3,
        "FMA": 1.4,
        "bf16x6": 1.5,
        "tensor cores": 0.8,
        "mma.sync": 1.5,
        "splitting": 1.0,
        "sum launch": 1.0,
        "partial sums": 1.0,
    },
    "torch": {
        **_same(1.0, "launch", *KINDS),
        **_same(1.0, "length", "forward", "dgrad"),
        **_same(1.0, "pointwise", *KINDS),
        "product": 1.1,
        "idle": 0.1,
        "memory": 1.0,
        "pointwise launch": 0.6,
        "unaligned memory": 0.5,
        "unaligned product": 1.0,
        "thin": 0.3,
    },
}
# The parts of a kernel overlap, so a rate may be below 1. A rate must not become 0 if no reading is bound by its part.
FLOORS: Terms = {"FMA": 1.25, "bf16x6": 1.2, "tensor cores": 0.6, "mma.sync": 1.2, "L2": 0.36, "splitting": 0.5}


def fit(rows: Sequence[Row], device: Device) -> Rates:
    """Fit the rates to rows that were measured on a device."""
    rates = Rates(**{side: dict.fromkeys(("16", "32"), expected) for side, expected in EXPECTED.items()})
    torch_rates = _solve(
        "torch",
        [
            (operand_bits(row.problem), torch_terms(row.problem, device), 1e-3 * row.torch_ms)
            for row in table_files.fastest(rows)
        ],
    )
    measured = [(row, ms) for row in rows if (ms := kernel_ms(row)) is not None]
    for _ in range(ROUNDS):
        readings = []
        for row, ms in measured:
            tile = row.tile or layer_tiles.choose(row.problem, device, rates)
            readings.append((operand_bits(row.problem), kernel_terms(row.problem, tile, device), 1e-3 * ms))
        rates = Rates(_solve("kernel", readings), torch_rates)
    return rates


def kernel_ms(row: Row) -> float | None:
    """Return the milliseconds of our kernel; None if none was measured, or if it multiplied planes.

    Products by planes have an estimate of their own (`layer_tiles.planes_seconds`).
    """
    return None if row.ms == row.planes_ms else row.ms


def _solve(side: str, readings: Iterable[tuple[str, Terms, float]]) -> dict[str, Terms]:
    """Solve for the rates of 16-bit and of 32-bit products, from readings (bits, terms, seconds)."""
    readings = list(readings)
    names = list(EXPECTED[side])
    floors = np.array([FLOORS.get(name, 0.0) for name in names])
    expected = np.array([EXPECTED[side][name] for name in names])
    rates = {}
    for bits in ("16", "32"):
        selected = [(terms, seconds) for reading_bits, terms, seconds in readings if reading_bits == bits]
        relative = np.array([[terms.get(name, 0.0) / seconds for name in names] for terms, seconds in selected])
        relative = relative.reshape(len(selected), len(names))
        pull = math.sqrt(PULL * len(selected)) * 0.1 * np.eye(len(names))
        system = np.vstack([relative, pull])
        target = np.concatenate([1 - relative @ floors, pull @ (expected - floors)])
        solution, _ = nnls(system, target)
        rates[bits] = {name: round(float(rate), 3) for name, rate in zip(names, solution + floors)}
    return rates


@dataclass(frozen=True)
class Verdict:
    """The quality of choices between PyTorch and the kernels, by readings.

    Attributes:
        regret: the geometric mean of (time of the choice) / (time of the faster one).
        torch: among the rows in which the kernel has less than 0.95 of PyTorch's speed, the share that choose PyTorch.
        ours: among the rows in which the kernel is more than 1.1 times as fast, the share that choose the kernel.
    """

    regret: float
    torch: float
    ours: float


def judge(choices: Iterable[tuple[Row, bool]]) -> Verdict:
    """Judge choices, which are pairs (row, True if PyTorch was chosen)."""
    regrets, torch_where_better, ours_where_better = [], [], []
    for row, torch_chosen in choices:
        ms = kernel_ms(row)
        assert ms is not None
        ratio = row.torch_ms / ms
        regrets.append(max(1.0, ratio if torch_chosen else 1 / ratio))
        if ratio < 0.95:
            torch_where_better.append(torch_chosen)
        elif ratio > 1.1:
            ours_where_better.append(not torch_chosen)
    shares = (statistics.fmean(right) for right in (torch_where_better, ours_where_better))
    return Verdict(statistics.geometric_mean(regrets), *shares)


def choices(rows: Iterable[Row], device: Device, rates: Rates) -> list[tuple[Row, bool]]:
    """Return (row, True if the estimate chooses PyTorch) for each row in which a kernel was measured."""
    return [
        (row, layer_tiles.why_torch(row.problem, device, rates) is not None)
        for row in rows
        if kernel_ms(row) is not None
    ]


def errors(rows: Sequence[Row], device: Device, rates: Rates) -> dict[str, list[float]]:
    """Return |estimated / measured - 1| for every row, for "kernel" and for "torch"."""
    relative: dict[str, list[float]] = {"kernel": [], "torch": []}
    for row in rows:
        relative["torch"].append(abs(torch_seconds(row.problem, device, rates) / (1e-3 * row.torch_ms) - 1))
        ms = kernel_ms(row)
        if ms is not None:
            tile = row.tile or layer_tiles.choose(row.problem, device, rates)
            relative["kernel"].append(abs(kernel_seconds(row.problem, tile, device, rates) / (1e-3 * ms) - 1))
    return relative


def table_device(table: table_files.Table) -> Device:
    """Return the record of the device on which a table was measured.

    Raises:
        ValueError: kernels/devices.py has no record of it.
    """
    for name, device in DEVICES.items():
        if name in table.device and (table.arch, table.multiprocessors) == (device.arch, device.multiprocessors):
            return device
    raise ValueError(f"the table is from {table.device}; it needs to be from one of: {', '.join(DEVICES)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="fit kernels/rates.json to a measured table")
    parser.add_argument(
        "table", type=Path, metavar="TABLE.json", help="file that mlp-fused tune wrote (--out or --readings)"
    )
    options = parser.parse_args(arguments)
    try:
        table = table_files.read(options.table)
        device = table_device(table)
    except (FileNotFoundError, ValueError) as error:
        print(f"cannot fit: {error}", file=sys.stderr)
        return 2
    rates = fit(table.gemms, device)
    versions = ", ".join(f"{name} {table.versions[name]}" for name in ("torch", "triton", "driver"))
    kind = "readings of products" if table.readings else "products"
    origin = f"{len(table.gemms)} {kind} on {table.device}, {table.date[:10]}, {versions}"
    text = json.dumps({"fitted to": origin, "rates": asdict(rates)}, indent=1)
    RATES_FILE.write_text(text + "\n")
    print(text)
    for side, relative in errors(table.gemms, device, rates).items():
        median, ninth = statistics.median(relative), statistics.quantiles(relative, n=10)[-1]
        print(f"{side}: median error {median:.1%}, below {ninth:.1%} in nine of ten rows")
    verdict = judge(choices(table_files.fastest(table.gemms), device, rates))
    print(f"choices by these rates take {verdict.regret:.3f} of the faster one's time; where one is clearly faster,")
    print(f"they choose PyTorch in {verdict.torch:.1%} and the kernels in {verdict.ours:.1%} of the rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
