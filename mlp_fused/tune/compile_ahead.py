"""Compile ahead what a measurement launches."""

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
    """A product's kernel by a tile, to be compiled."""

    task: Product
    tile: tile_config.TileConfig

    @property
    def key(self) -> tuple[Any, ...]:
        """The key that workloads with one compiled kernel share: it has what Triton and our launchers see of sizes.

        (Where two of one key are two kernels after all, the second is compiled where it is launched.)
        """
        each = (self.task.width_out, self.task.width_in)
        widths = tuple((width == 1, width % 16 == 0, width % self.tile.block_k == 0) for width in each)
        tile = replace(self.tile, programs=0, split=min(self.tile.split, 2))
        return self.task.kind, self.task.dtype, self.task.activation, widths, self.task.rows * max(each) >= 2**31, tile


@dataclass(frozen=True)
class PathWork:
    """A whole network's kernels on a path, to be compiled; on that of layers with the tiles that are in force."""

    task: Whole
    path: str
    table: table_files.Table | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """As above; a network's own kernels do not depend on the rows."""
        work = self.task.workload if self.path == "layer" else replace(self.task.workload, rows=1)
        return self.path, self.task.training, work


def compile_ahead(work: TileWork | PathWork) -> None:
    """Compile what measuring would launch, where `compiling.compile_only` holds."""
    meta = torch.device("meta")
    with float32_set_to(work.task.precision):
        if isinstance(work, TileWork):
            Operands(work.task, meta).by_kernel(0, work.tile)
            return
        passes = Passes(work.task, meta)
        if work.table is None:
            gpu = devices.device_of(passes.xs[0])
            passes(functools.partial(passes.by_network, network_paths(work.task, gpu)[work.path]), 0)
        else:
            with paths.decided_by(work.table):
                passes(passes.by_layers, 0)
