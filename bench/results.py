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
    """The files do not make a report; the text says why, in a sentence."""


@dataclass(frozen=True)
class Results:
    """The results in one or more files of one machine.

    Attributes:
        machine: as machine.py has it.
        dates: when each file was written, ISO 8601.
        names: the files', in the order of their dates.
        rows: by id and device.
        replaced: how many rows of each file a later file has again.
    """

    machine: dict[str, Any]
    dates: tuple[str, ...]
    names: tuple[str, ...]
    rows: dict[tuple[str, str], Row]
    replaced: dict[str, int] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device of the report: "cuda" where there is a GPU."""
        return "cpu" if self.machine["gpu"] is None else "cuda"

    @property
    def name(self) -> str:
        name: str = self.machine["gpu"] or self.machine["cpu"]
        return name

    def row(self, cell: Cell) -> Row | None:
        return self.rows.get((str(cell), self.device))

    def measured(self, cells: Iterable[Cell], kind: type[T]) -> list[tuple[Cell, T]]:
        """The cells that have a row of a kind, with the row; a row that failed is of another kind."""
        found = [(cell, self.row(cell)) for cell in cells]
        return [(cell, row) for cell, row in found if isinstance(row, kind)]


# Reading


def load(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UnfitError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UnfitError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UnfitError(f"{path} is not JSON; it needs to be what --benchmark-json or bench/gpu.py wrote") from None


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        UnfitError: it cannot be read, is none of ours, holds no row, or is distorted.
    """
    content = load(path)
    try:
        if "benchmarks" in content:
            machine, date = content["machine_info"], content["datetime"]
            rows = [each["extra_info"] for each in content["benchmarks"]]
        else:
            machine, date, rows = content["machine"], content["updated"], list(content["rows"].values())
            if content["schema"] != SCHEMA:
                raise UnfitError(f"{path} is of schema {content['schema']}; this report reads {SCHEMA}: measure anew")
        rows = [from_json(row) for row in rows if "id" in row]
        missing = [name for name in (*ONE_MACHINE, "distorted") if name not in machine]
    except UnfitRowError as error:
        raise UnfitError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UnfitError(f"{path} holds no results of --benchmark-json or bench/gpu.py") from None
    if missing:
        raise UnfitError(f"{path} does not say what it was measured on ({', '.join(missing)}): measure anew")
    if machine["distorted"] is not None:
        raise UnfitError(f"{path} was measured in vain: {machine['distorted']}")
    if not rows:
        raise UnfitError(f"{path} holds no row that was measured")
    return Results(machine, (date,), (path.name,), {(row.id, row.device): row for row in rows})


def merge(several: Sequence[Results]) -> Results:
    """The rows of some files, those of a later one in place of an earlier one's.

    Raises:
        UnfitError: they are of more than one machine, set of versions or user's table.
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
                f"{other.names[0]} and {first.names[0]} do not mix ({'; '.join(values)}): make a report of each"
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
    """The grid's cells by family and phase, in the order of both."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in GRID:
        if cell.family in families:
            found.setdefault((cell.family, cell.phase), []).append(cell)
    return dict(sorted(found.items(), key=lambda each: (FAMILIES.index(each[0][0]), PHASES.index(each[0][1]))))


def is_meant(name: str, cell: Cell, device: str) -> bool:
    """True if a cell is compared with a baseline."""
    if cell.phase in GEMM_PHASES:
        return name in GEMM_BASELINES
    return any(each.name == name and each.applies(cell, device) for each in BASELINES)


def speedup(row: TimedRow, cell: Cell, name: str) -> float | None:
    """A baseline's time over ours: the device's time for a kernel by itself, otherwise that of a call.

    None where it was not measured.
    """
    found = row.baselines.get(name)
    if found is None:
        return None
    return found.kernel_speedup if cell.phase in GEMM_PHASES else found.speedup
