"""Measured tables: the fastest tile of each product, and the fastest path of each network, by device.

A choice comes from the first of these sources that has a row for the problem (<gpu> is `kernels.devices.device_slug` of
the device's name):

1. The user's own table, `$XDG_CACHE_HOME/mlp_fused/<gpu>.json` (by default under ~/.cache). `mlp-fused tune` writes it.
2. The packaged table, kernels/tuned/<gpu>.json.
3. The packaged table of a related GPU.
4. The estimate (layer_tiles.py), which has an answer for every problem.

A product by fp16 planes competes with the measured choice: see `layer_steps.choose_tile`.

`table_files.py` has the format of a table.

A row is valid for its widths, dtype, precision and activation, and for batches of half to twice the measured size. For
the path of a network, the row of the largest batch is valid for every batch: see `paths.network_path`.
Files of schema 1 have no activations: their forward and dgrad rows (activation None) are valid for every activation
that has no row of its own.

A related GPU has the same architecture and the same number of multiprocessors, as H100 and H200 do; a MIG slice is not
related. Its tiles are valid here. Its choice between torch and a tile is valid for products of more than
`COMPUTE_BOUND` FLOPs a byte. Below that the bandwidth decides, and the estimate uses this GPU's. Milliseconds are never
carried over from one GPU to another.

A row records the kernels that were measured (row_kernels.py). If they have changed since, the row is valid only if it
chooses torch. Otherwise the next source decides. If that is the estimate, the choice's source mentions the old row.

A table that was measured with another Triton (another first or second version number) is still the best guess, but a
tile may spill or fail to compile. So its tiles are used only if they are among `layer_tiles.candidates`. The logger
`mlp_fused` reports this once: as a warning for the user's own table, which `mlp-fused tune` can measure again, and as
INFO for a packaged one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..dtypes import dtype_name
from ..kernels import devices, layer_tiles, tile_config
from ..kernels.devices import Device
from ..kernels.language import HAS_TRITON, TRITON_VERSION
from ..kernels.tile_config import Problem, TileConfig
from .row_kernels import holds, is_outdated
from .table_files import Gemm, Table, read, row_key

logger = logging.getLogger("mlp_fused")

PACKAGED = Path(layer_tiles.__file__).parent / "tuned"
FARTHEST = 2  # a row is valid for batches up to this many times larger or smaller than the measured one
COMPUTE_BOUND = 200  # FLOPs a byte of a product above which a related GPU's choice of torch or a tile is valid
WITH_OLDER = "with an older kernel"


@dataclass(frozen=True)
class Choice:
    """A tile for a product, or None for torch's own product, and the source of this choice.

    `row` is the row of this device's table that the choice comes from; None if it comes from elsewhere.
    """

    tile: TileConfig | None
    source: str
    row: Gemm | None = field(default=None, compare=False)


def tile_for(problem: Problem, device: Device) -> TileConfig | None:
    """The tile for a problem; None for torch's own product."""
    return choice_for(problem, device).tile


@functools.lru_cache(maxsize=4096)
def choice_for(problem: Problem, device: Device) -> Choice:
    """The choice for a problem: measured on this device or on a related one, else estimated.

    A measured tile that uses tensor descriptors is not valid for tensors that they cannot describe.
    """
    for table in measured(device):
        if row := _row_for(problem, table, device):
            return Choice(row.tile, f"measured on {table.device}{_with(row)}", row)
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
    """The row of a table that is valid for a problem: one of the same activation, else one without an activation.

    With `outdated`, the row that would be valid if its kernel had not changed.
    """
    width_out, width_in = problem.widths
    wanted = (problem.kind, width_out, width_in, dtype_name(problem.dtype), problem.precision)
    rows = [
        row
        for row in table.gemms
        if (row.kind, row.width_out, row.width_in, row.dtype, row.precision) == wanted
        and holds(row) != outdated
        and (problem.aligned or row.tile is None or not row.tile.descriptors)
        and (row.tile is None or _is_of_this_triton(table) or row.tile in _candidates(row, problem.aligned, device))
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
    dtype: torch.dtype,
    precision: str,
    activation: str,
    training: bool,
    device: Device,
    outdated: bool = False,
) -> str | None:
    """The fastest path of a network, for the largest batch that was measured; None if none was measured.

    Args:
        widths: the widths from the input to the output.
        activation: the name of the hidden layers' activation.
        training: True for forward and backward, False for inference.
        outdated: True for the path that would be valid if its kernels had not changed.
    """
    wanted = (widths, dtype_name(dtype), precision, activation, training)
    for table in measured(device):
        rows = [
            row
            for row in table.networks
            if (row.widths, row.dtype, row.precision, row.activation, row.training) == wanted and holds(row) != outdated
        ]
        if rows:
            return max(rows, key=lambda row: row.rows).path
    return None


def _nearest(measured: Iterable[Gemm], rows: int) -> Gemm | None:
    """The row whose batch is nearest by ratio; None if none is within `FARTHEST`."""

    def ratio(row: Gemm) -> float:
        return max(row.rows, rows) / max(1, min(row.rows, rows))

    return min((row for row in measured if ratio(row) <= FARTHEST), key=ratio, default=None)


def _is_of_this_triton(table: Table) -> bool:
    if not HAS_TRITON:  # nothing compiles here; `explain` shows what the measured Triton would run
        return True
    return table.versions["triton"].split(".")[:2] == [str(number) for number in TRITON_VERSION]


def _candidates(row: Gemm, aligned: bool, device: Device) -> tuple[TileConfig, ...]:
    """The tiles that `mlp-fused tune` would measure for a row's product."""
    return layer_tiles.candidates(dataclasses.replace(row.problem, aligned=aligned), device)


def user_path(device: str) -> Path:
    """The file of the user's own table for a device."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # unset, empty or relative: the XDG specification's cases for the default
        cache = os.path.expanduser("~/.cache")
    return Path(cache, "mlp_fused", f"{devices.device_slug(device)}.json")


def packaged_path(device: str) -> Path:
    """The file of the packaged table for a device."""
    return PACKAGED / f"{devices.device_slug(device)}.json"


@functools.lru_cache(maxsize=64)
def related(device: Device) -> tuple[Table, ...]:
    """The packaged tables of related GPUs."""
    tables = []
    for path in sorted(PACKAGED.glob("*.json")):
        try:
            table = read(path)
        except ValueError:  # `measured` warns of it on its own GPU
            continue
        if table.is_related(device) and not table.readings:
            tables.append(table)
    return tuple(tables)


@functools.lru_cache(maxsize=64)
def measured(device: Device) -> tuple[Table, ...]:
    """The tables of a device, the user's before the packaged one. Warns of a file that cannot be used, and omits it."""
    tables = [table for table in _preferred if table.device == device.name]
    for path, level in ((user_path(device.name), logging.WARNING), (packaged_path(device.name), logging.INFO)):
        try:
            table = _fitting(path, read(path), device, level)
        except FileNotFoundError:
            continue
        except ValueError as error:
            logger.warning("%s; it is not used; delete it, and run `mlp-fused tune` to write a new one", error)
            continue
        if not _is_of_this_triton(table):
            then, today = table.versions["triton"], ".".join(map(str, TRITON_VERSION))
            logger.log(
                level,
                "%s was measured with Triton %s, but this is %s: only its tiles that `mlp-fused tune` would measure "
                "here are used; run it to measure again",
                path,
                then,
                today,
            )
        tables.append(table)
    return tuple(tables)


def _fitting(path: Path, table: Table, device: Device, level: int) -> Table:
    """The table without the tiles that the device cannot run. Raises ValueError if it is another device's table."""
    if table.readings:
        raise ValueError(f"{path} has readings of every tile; it needs to be a table, as `mlp-fused tune --out` writes")
    if devices.device_slug(table.device) != devices.device_slug(device.name):
        raise ValueError(f"{path} was measured on {table.device}; it needs to be measured on {device.name}")
    outdated = sum(not holds(row) for row in table.rows)
    if outdated:
        rows = "one row was" if outdated == 1 else f"{outdated} rows were"
        unused = f"{rows} measured with older kernels, and not used"
        logger.log(level, "%s: %s; `mlp-fused tune` measures again", path, unused)
    whys = [_why_unfit(row, device) for row in table.gemms]
    unfit = [f"gemms[{index}].tile {why}" for index, why in enumerate(whys) if why is not None]
    if unfit:
        rows = "this row is not used" if len(unfit) == 1 else f"this and {len(unfit) - 1} more rows are not used"
        logger.log(level, "%s: %s; %s; `mlp-fused tune` measures again", path, unfit[0], rows)
    return dataclasses.replace(table, gemms=tuple(row for row, why in zip(table.gemms, whys) if why is None))


def _why_unfit(row: Gemm, device: Device) -> str | None:
    """The reason why a row's tile cannot run on a device; None if it can."""
    if row.tile is None:
        return None
    if row.tile.warp_specialize and TRITON_VERSION < (3, 7):
        return "specializes warps; it needs Triton 3.7 or newer"
    needed = tile_config.shared_memory(row.problem, row.tile, device)
    if needed > device.shared_memory:
        return f"takes {needed} bytes of shared memory; {device.name} has {device.shared_memory}"
    return None


_preferred: tuple[Table, ...] = ()  # these come before the tables on disk


@contextlib.contextmanager
def preferred(table: Table) -> Iterator[None]:
    """Within the block, `table` comes before the tables on disk. Call `forget` after entering and after leaving it."""
    global _preferred
    before, _preferred = _preferred, (table,)
    try:
        yield
    finally:
        _preferred = before


def forget() -> None:
    """Clear the caches of tables, so that the next choice reads the files again. Call it after a file was written."""
    for cache in (measured, related, choice_for, path_for):
        cache.cache_clear()


def merge(old: Table, new: Table) -> Table:
    """A table with the rows of both tables. If both have a row for a problem, it has that of `new`.

    The date and the versions are those of `new`.

    Raises:
        ValueError: the tables are of different devices.
    """
    if old.device != new.device:
        raise ValueError(f"the old table was measured on {old.device}; it needs to be measured on {new.device}")
    gemms = {row_key(row, new): row for row in (*old.gemms, *new.gemms)}
    networks = {row.key: row for row in (*old.networks, *new.networks)}
    return dataclasses.replace(new, gemms=tuple(gemms.values()), networks=tuple(networks.values()))
