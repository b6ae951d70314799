"""Read files of results, merge those of one machine, and look rows up in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench.baselines import BASELINES
from bench.gemm import GEMM_BASELINES
from bench.gpu import SAME, SCHEMA
from bench.problem import FAMILIES, GEMM_PHASES, GRID, NETWORK_PHASES, PHASES, Cell
from bench.rows import Row, TimedRow, UnfitRowError, from_json

ONE_MACHINE = (*SAME, "cpu")
NETWORKS = tuple(NETWORK_PHASES)
COPIES = [cell for cell in GRID if cell.phase == "copy"]
T = TypeVar("T", bound=Row)


class UnfitError(ValueError):
    """The files cannot be used for a report. The message gives the reason in one sentence."""


@dataclass(frozen=True)
class Results:
    """The results in one or more files of one machine.

    Attributes:
        machine: the description by machine.py.
        dates: the date of each file, ISO 8601.
        names: the names of the files, in the order of their dates.
        rows: the rows, by id and device.
        replaced: for each file, the number of its rows that a later file also has.
    """

    machine: dict[str, Any]
    dates: tuple[str, ...]
    names: tuple[str, ...]
    rows: dict[tuple[str, str], Row]
    replaced: dict[str, int] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device of the report: "cuda" if the machine has a GPU, else "cpu"."""
        return "cpu" if self.machine["gpu"] is None else "cuda"

    @property
    def name(self) -> str:
        """The name of the GPU, or of the CPU without a GPU."""
        name: str = self.machine["gpu"] or self.machine["cpu"]
        return name

    def row(self, cell: Cell) -> Row | None:
        """Return the row of a cell on the report's device; None if there is none."""
        return self.rows.get((str(cell), self.device))

    def measured(self, cells: Iterable[Cell], kind: type[T]) -> list[tuple[Cell, T]]:
        """Return (cell, row) for the cells that have a row of this class. Failed rows have another class."""
        rows = [(cell, self.row(cell)) for cell in cells]
        return [(cell, row) for cell, row in rows if isinstance(row, kind)]


# Reading


def load(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UnfitError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UnfitError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UnfitError(f"{path} is not JSON; it needs to be a file of --benchmark-json or bench/gpu.py") from None


def read(path: Path) -> Results:
    """Read the results in a file.

    Raises:
        UnfitError: the file cannot be read, has other content, has no rows, or its times are distorted.
    """
    content = load(path)
    try:
        if "benchmarks" in content:
            machine, date = content["machine_info"], content["datetime"]
            rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        else:
            machine, date, rows = content["machine"], content["updated"], list(content["rows"].values())
            if content["schema"] != SCHEMA:
                raise UnfitError(f"{path} has schema {content['schema']}; it needs schema {SCHEMA}: measure again")
        rows = [from_json(row) for row in rows if "id" in row]
        missing = [name for name in (*ONE_MACHINE, "distorted") if name not in machine]
    except UnfitRowError as error:
        raise UnfitError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UnfitError(f"{path} has no results of --benchmark-json or bench/gpu.py") from None
    if missing:
        raise UnfitError(f"{path} does not describe its machine ({', '.join(missing)} missing): measure again")
    if machine["distorted"] is not None:
        raise UnfitError(f"{path} has distorted times: {machine['distorted']}")
    if not rows:
        raise UnfitError(f"{path} has no measured row")
    return Results(machine, (date,), (path.name,), {(row.id, row.device): row for row in rows})


def merge(several: Sequence[Results]) -> Results:
    """Merge the rows of several files. Rows of later files replace those of earlier ones.

    Raises:
        UnfitError: the files differ in their machine, versions or user's table.
    """
    first, *others = sorted(several, key=lambda results: results.dates)
    rows = dict(first.rows)
    replaced: dict[str, int] = {}
    owner = dict.fromkeys(rows, first.names[0])
    for other in others:
        differs = [name for name in ONE_MACHINE if other.machine[name] != first.machine[name]]
        if differs:
            values = (f"{name} {other.machine[name]} instead of {first.machine[name]}" for name in differs)
            raise UnfitError(
                f"{other.names[0]} and {first.names[0]} differ ({'; '.join(values)}): make a report of each"
            )
        for key, row in other.rows.items():
            if key in rows:
                replaced[owner[key]] = replaced.get(owner[key], 0) + 1
            rows[key], owner[key] = row, other.names[0]
    dates = tuple(date for results in (first, *others) for date in results.dates)
    names = tuple(name for results in (first, *others) for name in results.names)
    return Results(first.machine, dates, names, rows, replaced)


# The grid and its baselines


def groups(families: Sequence[str]) -> dict[tuple[str, str], list[Cell]]:
    """Return the cells of the grid by (family, phase), sorted by the order of families and phases."""
    unsorted: dict[tuple[str, str], list[Cell]] = {}
    for cell in GRID:
        if cell.family in families:
            unsorted.setdefault((cell.family, cell.phase), []).append(cell)
    return dict(sorted(unsorted.items(), key=lambda item: (FAMILIES.index(item[0][0]), PHASES.index(item[0][1]))))


def is_meant(name: str, cell: Cell, device: str) -> bool:
    """True if a cell is compared with a baseline."""
    if cell.phase in GEMM_PHASES:
        return name in GEMM_BASELINES
    return any(baseline.name == name and baseline.applies(cell, device) for baseline in BASELINES)


def speedup(row: TimedRow, cell: Cell, name: str) -> float | None:
    """Return a baseline's time / ours: device times for a gemm row, times of a call otherwise.

    None if the baseline was not measured.
    """
    comparison = row.baselines.get(name)
    if comparison is None:
        return None
    return comparison.kernel_speedup if cell.phase in GEMM_PHASES else comparison.speedup
