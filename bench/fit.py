"""Fit the rates of the estimate to a measured table, or to readings: `python -m bench.fit kernels/tuned/<gpu>.json`.

seconds = Σ rate · term for each row (kernels/estimate.py). The rates minimise the squared relative errors, with three
constraints: none is negative, a unit that multiplies is no faster than `FLOORS` allows, and rates that the readings
leave open stay near `EXPECTED`. The time of a row that has no tile, because torch won, is that of the tile with the
least estimated time. A file of readings (`mlp-fused tune --readings`) has a row for every tile. The command prints the
rates and their errors, and writes kernels/rates.json.
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
    bits_of,
    kernel_seconds,
    kernel_terms,
    torch_seconds,
    torch_terms,
)

Row = table_files.Gemm
Terms = dict[str, float]

KINDS = ("forward", "dgrad", "wgrad")
PULL = 0.01  # weight of the distance from EXPECTED, beside the mean squared relative error
ROUNDS = 3  # of choosing tiles for the rows that have none, and fitting again


def _each(value: float, name: str, *kinds: str) -> Terms:
    return {f"{kind} {name}": value for kind in kinds}


EXPECTED: dict[str, Terms] = {
    "kernel": {
        **_each(1.0, "launch", *KINDS),
        **_each(1.0, "memory", *KINDS),
        **_each(0.3, "piecewise", "forward", "dgrad"),
        **_each(1.0, "transcendental", "forward", "dgrad"),
        **_each(0.3, "unaligned", *KINDS),
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
        **_each(1.0, "launch", *KINDS),
        **_each(1.0, "length", "forward", "dgrad"),
        **_each(1.0, "pointwise", *KINDS),
        "product": 1.1,
        "idle": 0.1,
        "memory": 1.0,
        "pointwise launch": 0.6,
        "unaligned memory": 0.5,
        "unaligned product": 1.0,
        "thin": 0.3,
    },
}
# Parts overlap in a kernel, so a rate may be below 1; one that no reading is bound by must not vanish.
FLOORS: Terms = {"FMA": 1.25, "bf16x6": 1.2, "tensor cores": 0.6, "mma.sync": 1.2, "L2": 0.36, "splitting": 0.5}


def fit(rows: Sequence[Row], device: Device) -> Rates:
    """The rates for some rows of a table that was measured on a device."""
    rates = Rates(**{side: dict.fromkeys(("16", "32"), expected) for side, expected in EXPECTED.items()})
    torch_rates = _solve(
        "torch",
        [
            (bits_of(row.problem), torch_terms(row.problem, device), 1e-3 * row.torch_ms)
            for row in table_files.fastest(rows)
        ],
    )
    measured = [(row, row.ms) for row in rows if row.ms is not None]
    for _ in range(ROUNDS):
        readings = []
        for row, ms in measured:
            tile = row.tile or layer_tiles.choose(row.problem, device, rates)
            readings.append((bits_of(row.problem), kernel_terms(row.problem, tile, device), 1e-3 * ms))
        rates = Rates(_solve("kernel", readings), torch_rates)
    return rates


def _solve(side: str, readings: Iterable[tuple[str, Terms, float]]) -> dict[str, Terms]:
    """The rates of 16-bit and of 32-bit products from (bits, terms, seconds)."""
    readings = list(readings)
    names = list(EXPECTED[side])
    floors = np.array([FLOORS.get(name, 0.0) for name in names])
    expected = np.array([EXPECTED[side][name] for name in names])
    rates = {}
    for bits in ("16", "32"):
        chosen = [(terms, seconds) for each, terms, seconds in readings if each == bits]
        parts = np.array([[terms.get(name, 0.0) / seconds for name in names] for terms, seconds in chosen])
        parts = parts.reshape(len(chosen), len(names))
        pull = math.sqrt(PULL * len(chosen)) * 0.1 * np.eye(len(names))
        system = np.vstack([parts, pull])
        target = np.concatenate([1 - parts @ floors, pull @ (expected - floors)])
        solution, _ = nnls(system, target)
        rates[bits] = {name: round(float(rate), 3) for name, rate in zip(names, solution + floors)}
    return rates


@dataclass(frozen=True)
class Verdict:
    """A comparison of choices between torch and our kernels with readings.

    Attributes:
        regret: geometric mean of the chosen one's time over the faster one's.
        torch: the share of rows on which torch is chosen, where ours reaches less than 0.95 of its speed.
        ours: the share of rows on which ours is chosen, where it is more than 1.1 times as fast.
    """

    regret: float
    torch: float
    ours: float


def judge(choices: Iterable[tuple[Row, bool]]) -> Verdict:
    """The verdict on (row, whether torch was chosen)."""
    regrets, torch_where_better, ours_where_better = [], [], []
    for row, torch_chosen in choices:
        assert row.ms is not None
        ratio = row.torch_ms / row.ms
        regrets.append(max(1.0, ratio if torch_chosen else 1 / ratio))
        if ratio < 0.95:
            torch_where_better.append(torch_chosen)
        elif ratio > 1.1:
            ours_where_better.append(not torch_chosen)
    shares = (statistics.fmean(each) for each in (torch_where_better, ours_where_better))
    return Verdict(statistics.geometric_mean(regrets), *shares)


def choices(rows: Iterable[Row], device: Device, rates: Rates) -> list[tuple[Row, bool]]:
    """For each row that has a time of ours, whether the estimate leaves its product to torch."""
    return [(row, layer_tiles.why_torch(row.problem, device, rates) is not None) for row in rows if row.ms is not None]


def errors(rows: Sequence[Row], device: Device, rates: Rates) -> dict[str, list[float]]:
    """|estimated / measured - 1| of every row, by "kernel" and "torch"."""
    found: dict[str, list[float]] = {"kernel": [], "torch": []}
    for row in rows:
        found["torch"].append(abs(torch_seconds(row.problem, device, rates) / (1e-3 * row.torch_ms) - 1))
        if row.ms is not None:
            tile = row.tile or layer_tiles.choose(row.problem, device, rates)
            found["kernel"].append(abs(kernel_seconds(row.problem, tile, device, rates) / (1e-3 * row.ms) - 1))
    return found


def device_of(table: table_files.Table) -> Device:
    """The data sheet of the device that a table was measured on.

    Raises:
        ValueError: there is none.
    """
    for name, device in DEVICES.items():
        if name in table.device and (table.arch, table.multiprocessors) == (device.arch, device.multiprocessors):
            return device
    raise ValueError(f"{table.device} has no data sheet; it needs to be one of: {', '.join(DEVICES)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="fit kernels/rates.json to a measured table")
    parser.add_argument(
        "table", type=Path, metavar="TABLE.json", help="as mlp-fused tune writes it by --out or --readings"
    )
    options = parser.parse_args(arguments)
    try:
        table = table_files.read(options.table)
        device = device_of(table)
    except (FileNotFoundError, ValueError) as error:
        print(f"nothing was fitted: {error}", file=sys.stderr)
        return 2
    rates = fit(table.gemms, device)
    versions = ", ".join(f"{name} {table.versions[name]}" for name in ("torch", "triton", "driver"))
    what = "readings of products" if table.readings else "products"
    origin = f"{len(table.gemms)} {what} on {table.device}, {table.date[:10]}, {versions}"
    text = json.dumps({"fitted to": origin, "rates": asdict(rates)}, indent=1)
    RATES_FILE.write_text(text + "\n")
    print(text)
    for side, found in errors(table.gemms, device, rates).items():
        middle, ninth = statistics.median(found), statistics.quantiles(found, n=10)[-1]
        print(f"{side}: median error {middle:.1%}, {ninth:.1%} in nine of ten")
    verdict = judge(choices(table_files.fastest(table.gemms), device, rates))
    print(f"chosen by these rates: {verdict.regret:.3f} of the faster one's time, torch where it is clearly faster in")
    print(f"{verdict.torch:.1%}, ours where it is clearly faster in {verdict.ours:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
