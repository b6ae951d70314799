"""fp32 operands that the kernel splits into planes, and the launches of their product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mlp_fused.kernels.planes import PLANES, SIDE, Exponents, Operand, info_shape, planes_shape, redo_tile, split
from mlp_fused.kernels.tile_config import TileConfig

__all__ = ["Split", "launches", "split_by_kernel"]


class Split(NamedTuple):
    """The result of `planes.split`, in memory that was NaN, or -1, before."""

    planes: Tensor
    info: Tensor
    sums: Tensor
    form: Exponents

    @property
    def flags(self) -> Tensor:
        """The flags of each block."""
        return self.info[0]

    def exponents(self) -> Tensor:
        """The exponent of each element."""
        rows, width = self.planes.shape[1:]
        count, blocks_m, blocks_n = self.info.shape
        exponents = self.info.flatten()[blocks_m * blocks_n :].view(blocks_m, blocks_n, count - 1)
        along_rows, along_columns = {"blocks": (1, 1), "rows": (SIDE, 1), "columns": (1, SIDE)}[self.form]
        expanded = exponents.view(blocks_m, blocks_n, along_rows, along_columns).expand(-1, -1, SIDE, SIDE)
        return expanded.transpose(1, 2).reshape(blocks_m * SIDE, blocks_n * SIDE)[:rows, :width]

    def restored(self) -> Tensor:
        """The values that the planes stand for, in float64."""
        parts = [plane.double() / 2 ** (11 * i) for i, plane in enumerate(self.planes)]
        return sum(parts) * torch.exp2(-self.exponents().double())


def split_by_kernel(x: Tensor, exponents: Exponents = "blocks", count: int = 2) -> Split:
    """Split x into `count` planes."""
    shape, strides = planes_shape(*x.shape, count)
    planes = torch.empty_strided(shape, strides, dtype=torch.float16, device=x.device).fill_(torch.nan)
    info = torch.full(info_shape(*x.shape, exponents), -1, dtype=torch.int32, device=x.device)
    sums = torch.full((info.shape[1], x.shape[1]), torch.nan, device=x.device)
    split(x, planes, info, sums, exponents)
    return Split(planes, info, sums, exponents)


def launches(
    a: Tensor, b: Tensor, tile: TileConfig, exponents: Exponents = "blocks"
) -> Iterator[tuple[Operand, Operand, TileConfig]]:
    """The operands and the tile of each launch that a product takes: with planes, the product and "redo".

    `exponents` are those of a.
    """
    if tile.precision not in PLANES:
        yield a, b, tile
        return
    count = PLANES[tile.precision]
    split_a, split_b = split_by_kernel(a, exponents, count), split_by_kernel(b, count=count)
    yield (split_a.planes, split_a.info), (split_b.planes, split_b.info), tile
    yield (a, split_a.info), (b, split_b.info), redo_tile(tile)
