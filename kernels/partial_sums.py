"""sums = Σ_s partial[s]: partial sums of shape (splits, columns), added over the splits in a fixed order.

Several programs that share a sum each write one partial sum. There are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .language import tl, triton
from .launch import Launch, cdiv, launch, offset_type
from .tile import store
from .tile_config import TileConfig

# Adding partial sums is bound by memory. Row after row it would be bound by latency, so many rows are loaded at a time.
SUM_PARTIALS = TileConfig(64, block_k=32, num_warps=4)  # for few partial sums
SUM_OF_MORE = TileConfig(32, block_k=64, num_warps=4)
SUM_OF_MANY = TileConfig(32, block_k=128, num_warps=8)
FEW_COLUMNS = 8192  # in blocks of 32 columns, 256 programs: about two for each multiprocessor of a large GPU


def sum_tile(splits: int, columns: int) -> TileConfig:
    """The tile of `sum_partials`: the fastest on an H100 of those in tests/data/h100/narrow.log.

    It depends on the shape of the partial sums alone. So does the order of the additions, and with it every bit.
    """
    if splits <= SUM_PARTIALS.block_k:
        return SUM_PARTIALS
    return SUM_OF_MANY if splits > SUM_OF_MORE.block_k and columns <= FEW_COLUMNS else SUM_OF_MORE


@triton.jit(do_not_specialize=["splits"])
def sum_partials_kernel(
    partial_ptr,  # (splits, size), contiguous
    sum_ptrs,  # contiguous tensors, each the sum of some columns of partial
    starts,  # the first column of each
    sizes,  # the number of columns of each
    splits,
    size,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,  # columns
    BLOCK_K: tl.constexpr,  # splits at a time
):
    cols = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.arange(0, BLOCK_K)
    inside = cols < size
    totals = tl.zeros((BLOCK_K, BLOCK_M), partial_ptr.dtype.element_ty)
    for first in range(0, splits, BLOCK_K):
        ptrs = partial_ptr + (first + rows).to(OFFSET)[:, None] * size + cols[None, :]
        totals += tl.load(ptrs, mask=(first + rows < splits)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(totals, axis=0)
    for i in tl.static_range(len(sum_ptrs)):
        at = cols - starts[i]
        store(sum_ptrs[i] + at, total, (at >= 0) & (at < sizes[i]))


def sum_partials(partial: Tensor, sums: Sequence[Tensor], starts: Sequence[int] | None = None) -> Launch | None:
    """Launch [sums …] = Σ_s partial[s], added in a fixed order, so that every run gives the same bits.

    Args:
        partial: (splits, columns), contiguous.
        sums: contiguous, written, of any float dtype.
        starts: the columns at which the sums begin; None: the sums lie one after the other.
    """
    splits, size = partial.shape
    tile = sum_tile(splits, size)
    sizes = tuple(total.numel() for total in sums)
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0) if starts is None else starts)
    assert starts[-1] + sizes[-1] <= size
    return launch(
        sum_partials_kernel,
        cdiv(size, tile.block_m),
        partial.device,
        tile,
        (partial, tuple(sums)),
        (starts, sizes, splits, size),
        OFFSET=offset_type(partial),
    )


@dataclass(frozen=True)
class Partial:
    """The layout of the partial sums of dW and db, (splits, columns). The columns of db begin 16-byte aligned."""

    splits: int
    size_w: int
    size_b: int
    dtype: torch.dtype

    @property
    def starts(self) -> tuple[int, ...]:
        """The first column of dW and the first column of db, leaving out a gradient that is not wanted."""
        return ((0,) if self.size_w else ()) + ((self.start_b,) if self.size_b else ())

    @property
    def start_b(self) -> int:
        return cdiv(self.size_w, 4) * 4

    @property
    def columns(self) -> int:
        return self.start_b + self.size_b

    def allocate(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(the whole buffer, its view for dW, its view for db). A view is None if that gradient is not wanted."""
        whole = torch.empty((self.splits, self.columns), dtype=self.dtype, device=device)
        return whole, whole if self.size_w else None, whole[:, self.start_b :] if self.size_b else None
