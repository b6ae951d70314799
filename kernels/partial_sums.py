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
SUM_PARTIALS = TileConfig(64, block_k=32, num_warps=4)  # of few partials
SUM_OF_MORE = TileConfig(32, block_k=64, num_warps=4)
SUM_OF_MANY = TileConfig(32, block_k=128, num_warps=8)
FEW_COLUMNS = 8192  # by 32, they make programs for no more than the multiprocessors of a large GPU, twice


def sum_tile(splits: int, columns: int) -> TileConfig:
    """The tile of `sum_partials`: the fastest on an H100 of those in tests/data/h100/narrow.log.

    It depends on the shape of the partial sums alone, so that the order of a sum, and its bits, do too.
    """
    if splits <= SUM_PARTIALS.block_k:
        return SUM_PARTIALS
    return SUM_OF_MANY if splits > SUM_OF_MORE.block_k and columns <= FEW_COLUMNS else SUM_OF_MORE


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


def sum_partials(partial: Tensor, sums: Sequence[Tensor], starts: Sequence[int] | None = None) -> Launch | None:
    """[sums …] = Σ_s partial[s], always in one order: the same bits every run.

    Args:
        partial: (splits, columns), contiguous.
        sums: contiguous, written, of any float dtype.
        starts: the columns at which they begin; None: one after the other.
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
