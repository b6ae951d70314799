import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .language import tl, triton
from .launch import Launch, cdiv, launch, offset_type
from .tile import store
from .tile_config import TileConfig

# A sum over partials is bound by memory, and by latency where one row follows the other: many rows at a time.
# On an H100, Triton 3.6, 1056 partials of 4224 columns took 5.3 µs with 32 columns and 128 rows a tile, 19.0 with 64
# and 32.
SUM_PARTIALS = TileConfig(64, block_k=32, num_warps=4)
SUM_MANY_PARTIALS = TileConfig(32, block_k=128, num_warps=8)
MANY = 128


@triton.jit(do_not_specialize=["splits"])
def sum_partials_kernel(
    partial_ptr,  # (splits, size), contiguous
    sum_ptrs,  # contiguous tensors, each some columns of partial
    starts,  # the column at which each begins
    sizes,  # how many each has
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


def sum_partials_tile(splits: int) -> TileConfig:
    """The tile for a sum over so many partials."""
    return SUM_MANY_PARTIALS if splits >= MANY else SUM_PARTIALS


def sum_partials(partial: Tensor, sums: Sequence[Tensor], starts: Sequence[int] | None = None) -> Launch | None:
    """[sums …] = Σ_s partial[s], always in one order: the same bits every run.

    Args:
        partial: (splits, columns), contiguous.
        sums: contiguous, written, of any float dtype.
        starts: the columns at which they begin; None: one after the other.
    """
    splits, size = partial.shape
    sizes = tuple(total.numel() for total in sums)
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0) if starts is None else starts)
    assert starts[-1] + sizes[-1] <= size
    tile = sum_partials_tile(splits)
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
    """Memory for the partial sums of dW and db: (splits, columns), those of db from a column at 16 bytes on."""

    splits: int
    size_w: int
    size_b: int
    dtype: torch.dtype

    @property
    def starts(self) -> tuple[int, ...]:
        """The column at which each wanted one begins."""
        return ((0,) if self.size_w else ()) + ((self.start_b,) if self.size_b else ())

    @property
    def start_b(self) -> int:
        return cdiv(self.size_w, 4) * 4

    @property
    def columns(self) -> int:
        return self.start_b + self.size_b

    def allocate(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """It as a whole, where dW's begin in it and where db's do."""
        whole = torch.empty((self.splits, self.columns), dtype=self.dtype, device=device)
        return whole, whole if self.size_w else None, whole[:, self.start_b :] if self.size_b else None
