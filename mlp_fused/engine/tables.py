"""Measured tables: which tile, and which path, was fastest on a device.

A choice comes from the first of these that knows the problem: the user's own table,
`$XDG_CACHE_HOME/mlp_fused/<gpu>.json` (by default under ~/.cache), which `mlp-fused tune` writes; the packaged table,
kernels/tuned/<gpu>.json; the packaged table of a related GPU; the estimate (layer_tiles.py). <gpu> is
`kernels.devices.device_slug` of the device's name.
`table_files.py` has the format.

A row holds for its own widths, dtype, precision and activation, and for batches of half to twice the measured size. A
file of schema 1 has no arch, no multiprocessors and no activations: its forward and dgrad rows (null here) hold for
every activation that no other row names.

A related GPU has the same architecture and as many multiprocessors (H100 and H200; no MIG slices): its tiles hold, and
where a product has more than `COMPUTE_BOUND` FLOPs a byte so does its choice between torch and a tile. Below, bandwidth
decides, and the estimate knows this GPU's. Milliseconds are never carried from one GPU to another.

A row says which kernels were measured (row_kernels.py). A row of kernels that have changed since then holds no more,
unless it is for torch: the estimate decides, and the choice's source says so.

Under another Triton (by its first two numbers) than `versions` has, what was faster is still the best guess, but a tile
may spill or not compile: of the tiles only those hold that are among `layer_tiles.candidates` here. The logger
`mlp_fused` says so once: a warning for the user's own table, which `mlp-fused tune` measures again, INFO for the
packaged one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..dtypes import dtype_name
from ..kernels import devices, layer_tiles, tile_config
from ..kernels.devices import Device
from ..kernels.language import HAS_TRITON, TRITON_VERSION
from ..kernels.tile_config import Problem, TileConfig
from .row_kernels import holds, is_outdated
from .table_files import (
    Gemm,
    Network,
    Table,
    identity,
    read,
)

__all__ = [
    "Choice",
    "asked_first",
    "choice_for",
    "forget",
    "is_path_outdated",
    "measured",
    "merge",
    "packaged_path",
    "path_for",
    "related",
    "tile_for",
    "user_path",
]

logger = logging.getLogger("mlp_fused")

PACKAGED = Path(layer_tiles.__file__).parent / "tuned"
FARTHEST = 2  # a row holds for so many times its rows, and for so small a part of them
COMPUTE_BOUND = 200  # FLOPs a byte of a product from which a related GPU's choice holds
WITH_OLDER = "with an older kernel"


@dataclass(frozen=True)
class Choice:
    """A tile for a product, or torch's own product where `tile` is None; and where the choice comes from."""

    tile: TileConfig | None
    source: str


Row = TypeVar("Row", Gemm, Network)


def tile_for(problem: Problem, device: Device) -> TileConfig | None:
    """The tile for a problem; None where torch's own product is taken."""
    return choice_for(problem, device).tile


@functools.lru_cache(maxsize=4096)
def choice_for(problem: Problem, device: Device) -> Choice:
    """The tile for a problem, or torch: as measured on this device, as on a related one, or as estimated.

    A measured tile that goes through tensor descriptors does not hold for tensors that they cannot describe.
    """
    for table in measured(device):
        if row := _row_for(problem, table, device):
            return Choice(row.tile, f"measured on {table.device}{_with(row)}")
    reason = layer_tiles.why_torch(problem, device)
    for table in related(device):
        if row := _row_for(problem, table, device):
            if _flops_a_byte(problem) > COMPUTE_BOUND:
                return Choice(row.tile, f"measured on {table.device}{_with(row)}")
            if reason is None and row.tile is not None:
                return Choice(row.tile, f"tile measured on {table.device}")
            break
    source = reason or "estimated"
    for table in measured(device):
        if _row_for(problem, table, device, outdated=True):
            source += f"; measured on {table.device} {WITH_OLDER}"
            break
    return Choice(None if reason else layer_tiles.choose(problem, device), source)


def _with(row: Gemm) -> str:
    return f" {WITH_OLDER}" if is_outdated(row) else ""


def _row_for(problem: Problem, table: Table, device: Device, outdated: bool = False) -> Gemm | None:
    """The row of a table that holds for a problem: of its activation, else of one that is not named.

    With `outdated`, the row that would hold if its kernel had not changed.
    """
    width_out, width_in = problem.widths
    wanted = (problem.kind, width_out, width_in, dtype_name(problem.dtype), problem.precision)
    rows = [
        row
        for row in table.gemms
        if (row.kind, row.width_out, row.width_in, row.dtype, row.precision) == wanted
        and holds(row) != outdated
        and (problem.aligned or row.tile is None or not row.tile.descriptors)
        and (row.tile is None or _is_of_this_triton(table) or row.tile in _known(row, problem.aligned, device))
    ]
    named = [row for row in rows if row.activation == problem.activation]
    unnamed = [row for row in rows if row.activation is None]
    return _nearest(named, problem.rows) or _nearest(unnamed, problem.rows)


def _flops_a_byte(problem: Problem) -> float:
    m, n, k = problem.m, problem.n, problem.k
    return 2 * m * n * k / ((m * k + n * k + m * n) * problem.dtype.itemsize)


@functools.lru_cache(maxsize=1024)
def path_for(
    widths: tuple[int, ...],
    rows: int | None,
    dtype: torch.dtype,
    precision: str,
    activation: str,
    training: bool,
    device: Device,
) -> str | None:
    """The path that was fastest for a network as measured; None where it was not measured.

    Args:
        widths: of the input to the output.
        rows: of the batch; None for a choice that does not depend on them: that of the largest batch measured.
        activation: of the hidden layers, by name.
        training: forward and backward; else inference.
    """
    wanted = (widths, dtype_name(dtype), precision, activation, training)
    for table in measured(device):
        found = [row for row in _networks(table, *wanted) if holds(row)]
        if rows is None and found:
            return max(found, key=lambda row: row.rows).path
        if rows is not None and (nearest := _nearest(found, rows)):
            return nearest.path
    return None


def is_path_outdated(
    widths: tuple[int, ...], dtype: torch.dtype, precision: str, activation: str, training: bool, device: Device
) -> bool:
    """True if a network's paths were measured, and all of it with kernels that have changed since."""
    wanted = (widths, dtype_name(dtype), precision, activation, training)
    rows = [row for table in measured(device) for row in _networks(table, *wanted)]
    return bool(rows) and not any(map(holds, rows))


def _networks(
    table: Table, widths: tuple[int, ...], dtype: str, precision: str, activation: str, training: bool
) -> list[Network]:
    """A table's rows of one network, of any batch."""
    wanted = (widths, dtype, precision, activation, training)
    return [
        row for row in table.networks if (row.widths, row.dtype, row.precision, row.activation, row.training) == wanted
    ]


def _nearest(measured: Iterable[Row], rows: int) -> Row | None:
    """The row whose batch is the nearest by ratio, where it is near enough."""

    def ratio(row: Row) -> float:
        return max(row.rows, rows) / max(1, min(row.rows, rows))

    return min((row for row in measured if ratio(row) <= FARTHEST), key=ratio, default=None)


def _is_of_this_triton(table: Table) -> bool:
    if not HAS_TRITON:  # nothing compiles here: what is planned for a GPU is what the measured Triton would run
        return True
    return table.versions["triton"].split(".")[:2] == [str(number) for number in TRITON_VERSION]


def _known(row: Gemm, aligned: bool, device: Device) -> tuple[TileConfig, ...]:
    """The tiles that the rule here would measure for a row's product."""
    return layer_tiles.candidates(dataclasses.replace(row.problem, aligned=aligned), device)


def user_path(device: str) -> Path:
    """Where a user's own table of a device lies."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the specification has it: not set, empty or relative
        cache = os.path.expanduser("~/.cache")
    return Path(cache, "mlp_fused", f"{devices.device_slug(device)}.json")


def packaged_path(device: str) -> Path:
    """Where the table of a device lies that came with the package."""
    return PACKAGED / f"{devices.device_slug(device)}.json"


@functools.lru_cache(maxsize=64)
def related(device: Device) -> tuple[Table, ...]:
    """The packaged tables of related GPUs."""
    tables = []
    for path in sorted(PACKAGED.glob("*.json")):
        try:
            table = read(path)
        except ValueError:  # of which `measured` warns on its own GPU
            continue
        if table.is_related(device) and not table.readings:
            tables.append(table)
    return tuple(tables)


@functools.lru_cache(maxsize=64)
def measured(device: Device) -> tuple[Table, ...]:
    """The tables of a device, the user's before the packaged one; what cannot be used is warned of and left out."""
    tables = [table for table in _first if table.device == device.name]
    for path, level in ((user_path(device.name), logging.WARNING), (packaged_path(device.name), logging.INFO)):
        try:
            table = _fitting(path, read(path), device, level)
        except FileNotFoundError:
            continue
        except ValueError as error:
            logger.warning("%s; it is not used; delete it, or let `mlp-fused tune` write a new one after that", error)
            continue
        if not _is_of_this_triton(table):
            then, today = table.versions["triton"], ".".join(map(str, TRITON_VERSION))
            logger.log(
                level,
                "%s was measured with Triton %s, this is %s: of its tiles only those are used that the rule here "
                "knows; `mlp-fused tune` measures anew",
                path,
                then,
                today,
            )
        tables.append(table)
    return tuple(tables)


def _fitting(path: Path, table: Table, device: Device, level: int) -> Table:
    """The table without the tiles that the device cannot run. Raises ValueError where it is another device's."""
    if table.readings:
        raise ValueError(f"{path} has readings of every tile; it needs to be a table, as `mlp-fused tune --out` writes")
    if devices.device_slug(table.device) != devices.device_slug(device.name):
        raise ValueError(f"{path} was measured on {table.device}; it needs to be of {device.name}")
    outdated = sum(not holds(row) for row in table.rows)
    if outdated:
        rows = "one row was" if outdated == 1 else f"{outdated} rows were"
        unused = f"{rows} measured with older kernels, and not used"
        logger.log(level, "%s: %s; `mlp-fused tune` measures anew", path, unused)
    whys = [_why_unfit(row, device) for row in table.gemms]
    unfit = [f"gemms[{index}].tile {why}" for index, why in enumerate(whys) if why is not None]
    if unfit:
        rows = "this row is not used" if len(unfit) == 1 else f"this and {len(unfit) - 1} more rows are not used"
        logger.log(level, "%s: %s; %s; `mlp-fused tune` measures anew", path, unfit[0], rows)
    return dataclasses.replace(table, gemms=tuple(row for row, why in zip(table.gemms, whys) if why is None))


def _why_unfit(row: Gemm, device: Device) -> str | None:
    """The reason for which a row's tile does not run on a device; None where it does."""
    if row.tile is None:
        return None
    if row.tile.warp_specialize and TRITON_VERSION < (3, 7):
        return "specialises warps; it needs Triton 3.7 or newer"
    needed = tile_config.shared_memory(row.problem, row.tile, device)
    if needed > device.shared_memory:
        return f"takes {needed} bytes of shared memory; {device.name} has {device.shared_memory}"
    return None


_first: tuple[Table, ...] = ()  # before those on disk


@contextlib.contextmanager
def asked_first(table: Table) -> Iterator[None]:
    """Within the block, `table` is asked before the others, as if it were on disk; see `forget` for both its ends."""
    global _first
    before, _first = _first, (table,)
    try:
        yield
    finally:
        _first = before


def forget() -> None:
    """Read the tables anew from now on: for after one was written."""
    for cache in (measured, related, choice_for, path_for):
        cache.cache_clear()


def merge(old: Table, new: Table) -> Table:
    """Both tables' rows; where both measured the same, `new`'s. Date and versions are `new`'s.

    Raises:
        ValueError: they are of different devices.
    """
    if old.device != new.device:
        raise ValueError(f"the old table was measured on {old.device}; it needs to be of {new.device}")
    gemms = {identity(row, new): row for row in (*old.gemms, *new.gemms)}
    networks = {row.key: row for row in (*old.networks, *new.networks)}
    return dataclasses.replace(new, gemms=tuple(gemms.values()), networks=tuple(networks.values()))
