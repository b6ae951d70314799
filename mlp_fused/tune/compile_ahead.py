"""Compile kernels before the tuner launches them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..engine import paths, table_files
from ..kernels import devices, tile_config
from .operands import Operands, Passes, float32_set_to
from .tasks import Product, Whole, network_paths


@dataclass(frozen=True)
class TileWork:
    """The kernel of a product with a tile, to compile ahead."""

    task: Product
    tile: tile_config.TileConfig

    @property
    def key(self) -> tuple[Any, ...]:
        """The key of the compiled kernel. It has the properties of sizes by which Triton and the launchers specialize.

        If two tiles with the same key need different kernels after all, the second kernel is compiled at its launch.
        """
        widths = (self.task.width_out, self.task.width_in)
        specialized = tuple((width == 1, width % 16 == 0, width % self.tile.block_k == 0) for width in widths)
        large = self.task.rows * max(widths) >= 2**31
        tile = replace(self.tile, programs=0, split=min(self.tile.split, 2))
        return self.task.kind, self.task.dtype, self.task.activation, specialized, large, tile


@dataclass(frozen=True)
class PathWork:
    """The kernels of a whole network on a path, to compile ahead. The layer path uses the tiles of `table`."""

    task: Whole
    path: str
    table: table_files.Table | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The key of the compiled kernels. Network kernels do not depend on the number of rows."""
        work = self.task.workload if self.path == "layer" else replace(self.task.workload, rows=1)
        return self.path, self.task.training, work


def compile_ahead(work: TileWork | PathWork) -> None:
    """Compile the kernels that measuring would launch. Call it within `compiling.compile_only`."""
    meta = torch.device("meta")
    with float32_set_to(work.task.precision):
        if isinstance(work, TileWork):
            Operands(work.task, meta).by_kernel(0, work.tile)
            return
        passes = Passes(work.task, meta)
        if work.table is None:
            gpu = devices.device_record(passes.xs[0])
            passes(functools.partial(passes.by_network, network_paths(work.task, gpu)[work.path]), 0)
        else:
            with paths.decided_by(work.table):
                passes(passes.by_layers, 0)
