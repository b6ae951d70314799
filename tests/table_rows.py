"""Rows and tables of measured tiles, and a function that writes tables where the package reads them."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlp_fused.engine import paths, table_files, tables
from mlp_fused.engine.row_kernels import stamped
from mlp_fused.engine.table_files import Gemm, Network, Table
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import DEVICES, Device
from mlp_fused.kernels.tile_config import Problem, TileConfig

H200 = DEVICES["NVIDIA H200"]
VERSIONS = {
    "mlp_fused": "0.1.0",
    "python": "3.12.1",
    "torch": "2.13.0",
    "triton": ".".join(map(str, tables.TRITON_VERSION)) + ".1",
    "cuda": "13.0",
    "driver": "5",
}
TILE = TileConfig(64, 32, 64, 8, 4, 3, programs=132, descriptors=True)
OTHER = TileConfig(16, 32, 64, 8, 4, 2)
FORWARD = Gemm("forward", 1024, 512, 256, "bfloat16", "ieee", "relu", TILE, 0.25, 0.5)
NARROW = Network((64, 64, 64), 4096, "float16", "ieee", "relu", True, "stored", {"stored": 1.0, "torch": 2.0})


def table(*rows: Gemm | Network, device: str = H200.name) -> Table:
    """A table of rows. Rows without a kernel get the digest of today's kernel."""
    rows = tuple(row if row.kernel else stamped(row) for row in rows)
    gemms = tuple(row for row in rows if isinstance(row, Gemm))
    networks = tuple(row for row in rows if isinstance(row, Network))
    return Table(device, "2026-01-31T12:00:00+00:00", VERSIONS, gemms, networks)


def install(user: Table | None = None, packaged: Table | None = None) -> None:
    for path, written in ((tables.user_path, user), (tables.packaged_path, packaged)):
        if written is not None:
            table_files.write(path(written.device), written)
    paths.forget_tables()


def problem(rows: int = 1024, **others: Any) -> Problem:
    return dataclasses.replace(FORWARD.problem, m=rows, **others)


def estimated(problem: Problem, device: Device = H200) -> TileConfig | None:
    """The choice for a product that was not measured: a tile, or None for torch's product."""
    return None if layer_tiles.why_torch(problem, device) else layer_tiles.choose(problem, device)


def outdated(row: Any, kernel: str | None = "0" * 16) -> Any:
    """The row as if it was measured with another kernel than today's. With None, it names no kernel."""
    return dataclasses.replace(row, kernel=kernel)
