"""fp32 operands that the kernel splits into planes, and the launches of their product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mlp_fused.kernels.activations import IDENTITY
from mlp_fused.kernels.layer_backward import wgrad_sums
from mlp_fused.kernels.partial_sums import Partial
from mlp_fused.kernels.plane_products import dgrad_by_planes, forward_by_planes, wgrad_by_planes
from mlp_fused.kernels.planes import PLANES, SIDE, Form, Operand, info_shape, planes_shape, redo_tile, split
from mlp_fused.kernels.tile_config import TileConfig

__all__ = [
    "OPERANDS",
    "Launches",
    "Split",
    "empty_split",
    "empty_sums",
    "launches",
    "normal",
    "product_by_planes",
    "split_by_kernel",
]

ALONG_ROWS = Form("rows")
# The forms of a product's two factors.
OPERANDS = {
    "forward": (Form("rows"), Form("rows")),
    "dgrad": (Form("rows", own=True), Form("columns")),
    "wgrad": (Form("columns", own=True), Form("columns")),
}
Forms = tuple[Form, Form]
Launches = Callable[[Tensor, Tensor, TileConfig, Forms], Iterator[tuple[Operand, Operand, TileConfig]]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers from a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Split(NamedTuple):
    """The result of `planes.split`, in memory that was NaN, or -1, before."""

    planes: Tensor
    info: Tensor
    sums: Tensor
    form: Form

    @property
    def flags(self) -> Tensor:
        """The flags of each block."""
        return self.info[0]

    def exponents(self) -> Tensor:
        """The exponent of each element."""
        rows, width = self.planes.shape[1:]
        count, blocks_m, blocks_n = self.info.shape
        exponents = self.info.flatten()[blocks_m * blocks_n :].view(blocks_m, blocks_n, count - 1)
        along_rows, along_columns = {"rows": (count - 1, 1), "columns": (1, count - 1)}[self.form.along]
        expanded = exponents.view(blocks_m, blocks_n, along_rows, along_columns).expand(-1, -1, SIDE, SIDE)
        return expanded.transpose(1, 2).reshape(blocks_m * SIDE, blocks_n * SIDE)[:rows, :width]

    def is_flagged(self) -> Tensor:
        """True for each element of a flagged block."""
        rows, width = self.planes.shape[1:]
        return self.flags.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)[:rows, :width] > 0

    def restored(self) -> Tensor:
        """The values that the planes stand for, in float64. In flagged blocks, they are halves of fp32 numbers."""
        parts = [plane.double() / 2 ** (11 * i) for i, plane in enumerate(self.planes)]
        values = sum(parts) * torch.exp2(-self.exponents().double())
        if len(self.planes) == 1:
            return values
        upper, lower = (plane.view(torch.int16).int() for plane in self.planes)
        return torch.where(self.is_flagged(), ((upper << 16) | (lower & 0xFFFF)).view(torch.float32).double(), values)


def empty_split(rows: int, width: int, form: Form, device: str | torch.device, count: int = 2) -> Split:
    """Memory for the result of a split: NaN, or -1."""
    shape, strides = planes_shape(rows, width, count)
    planes = torch.empty_strided(shape, strides, dtype=torch.float16, device=device).fill_(torch.nan)
    info = torch.full(info_shape(rows, width, form), -1, dtype=torch.int32, device=device)
    sums = torch.full((info.shape[1], width), torch.nan, device=device)
    return Split(planes, info, sums, form)


def split_by_kernel(x: Tensor, form: Form = ALONG_ROWS, count: int = 2) -> Split:
    """Split x into `count` planes."""
    written = empty_split(*x.shape, form, x.device, count)
    split(x, *written)
    return written


def launches(a: Tensor, b: Tensor, tile: TileConfig, forms: Forms) -> Iterator[tuple[Operand, Operand, TileConfig]]:
    """The operands and the tile of each launch that a product by planes takes: the product, and "redo"."""
    count = PLANES[tile.precision]
    split_a, split_b = (split_by_kernel(operand, form, count) for operand, form in zip((a, b), forms))
    yield (split_a.planes, split_a.info), (split_b.planes, split_b.info), tile
    yield (a, split_a.info), (b, split_b.info), redo_tile(tile)


def empty_sums(layout: Partial, m: int, n: int, device: torch.device) -> Tensor:
    """Memory for the partial sums of an (m, n) result, (splits, m, n): NaN. There may be gaps between the splits."""
    return torch.full((layout.splits, layout.columns), torch.nan, device=device)[:, : m * n].unflatten(1, (m, n))


def product_by_planes(kind: str, a: Tensor, b: Tensor, tile: TileConfig, launches: Launches = launches) -> Tensor:
    """x Wᵀ, dz W, or the partial sums of dzᵀ h, (splits, N, K)."""
    m, n = a.shape[1 if kind == "wgrad" else 0], b.shape[0 if kind == "forward" else 1]
    sums = wgrad_sums(a.shape[0], tile, torch.float32, m * n, 0)
    result = empty_sums(sums, m, n, a.device) if kind == "wgrad" else torch.full((m, n), torch.nan, device=a.device)
    for a_operand, b_operand, own in launches(a, b, tile, OPERANDS[kind]):
        if kind == "forward":
            forward_by_planes(a_operand, b_operand, None, result, None, IDENTITY, own)
        elif kind == "dgrad":
            dgrad_by_planes(a_operand, b_operand, None, result, None, IDENTITY, own)
        else:
            wgrad_by_planes(a_operand, b_operand, result, own, sums)
    return result
