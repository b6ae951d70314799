"""fp32 operands that the kernel splits into planes, and the launches of their product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mlp_fused.kernels.planes import Operand, info_shape, planes_shape, redo_tile, split
from mlp_fused.kernels.tile_config import TileConfig

__all__ = ["Split", "launches", "split_by_kernel"]


class Split(NamedTuple):
    """The result of `planes.split`, in memory that was NaN, or -1, before."""

    planes: Tensor
    info: Tensor
    sums: Tensor

    def restored(self) -> Tensor:
        """The values that the planes stand for, in float64."""
        rows, width = self.planes.shape[1:]
        exponents = self.info[0].repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :width]
        return (self.planes[0].double() + self.planes[1].double() / 2**11) * torch.exp2(-exponents.double())


def split_by_kernel(x: Tensor) -> Split:
    """Split x."""
    shape, strides = planes_shape(*x.shape)
    planes = torch.empty_strided(shape, strides, dtype=torch.float16, device=x.device).fill_(torch.nan)
    info = torch.full(info_shape(*x.shape), -1, dtype=torch.int32, device=x.device)
    sums = torch.full((info.shape[1], x.shape[1]), torch.nan, device=x.device)
    split(x, planes, info, sums)
    return Split(planes, info, sums)


def launches(a: Tensor, b: Tensor, tile: TileConfig) -> Iterator[tuple[Operand, Operand, TileConfig]]:
    """The operands and the tile of each launch of a product. With planes these are the product and "redo"."""
    if tile.precision != "fp16x3":
        yield a, b, tile
        return
    split_a, split_b = split_by_kernel(a), split_by_kernel(b)
    yield (split_a.planes, split_a.info), (split_b.planes, split_b.info), tile
    yield (a, split_a.info), (b, split_b.info), redo_tile(tile)
