"""One layer backward: dz where it has an activation of its own, dgrad into the layer below, wgrad with db.

dz = dh ⊙ a'(saved)                           output_gradient (and h again, likewise)
dz_below = (dz W) ⊙ a_below'(saved_below)     dgrad (and h_below again, where it was not kept)
dW = dzᵀ h_below,  db = Σ_rows dz             wgrad
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import configs
from .activations import Activation
from .dot import activate, differentiate, multiply, store, tile_position
from .language import tl, triton
from .launch import cdiv, launch, offset_type

__all__ = ["dgrad", "output_gradient", "sum_partials", "wgrad"]


@triton.jit(do_not_specialize=["M"])
def output_gradient_kernel(
    dh_ptr,  # (M, N)
    saved_ptr,  # (M, N), contiguous
    dz_ptr,  # (M, N), contiguous; may be dh
    h_ptr,  # (M, N), contiguous: the output, rebuilt from its pre-activation; or None
    M,
    N,
    stride_dm,
    stride_dn,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if dz_ptr.dtype.element_ty == tl.float64 else tl.float32
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, 1)
    rows = tile_m.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    dh_offsets = rows[:, None] * stride_dm + cols.to(OFFSET)[None, :] * stride_dn
    dh = tl.load(dh_ptr + dh_offsets, mask=mask, other=0.0).to(DTYPE)
    saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
    if h_ptr is not None:
        store(h_ptr + offsets, activate(saved, FORWARD, PARAMETERS), mask)
    store(dz_ptr + offsets, differentiate(dh, saved, BACKWARD, PARAMETERS), mask)


def output_gradient(
    dh: Tensor,
    saved: Tensor,
    dz: Tensor,
    activation: Activation,
    tile: configs.TileConfig | None = None,
    h: Tensor | None = None,
) -> None:
    """dz = dh ⊙ a'(saved), and h = a(saved) where `h` is given (saved is then the pre-activation); all (M, N).

    Args:
        dh: any strides, 0 included.
        saved: contiguous.
        dz: contiguous, written; may be dh itself. h likewise, or None.
    """
    M, N = dh.shape
    assert saved.shape == dz.shape == (M, N)
    assert saved.is_contiguous()
    assert dz.is_contiguous()
    assert h is None or (h.shape == (M, N) and h.is_contiguous())
    tile = tile or configs.choose(configs.Problem("output_gradient", M, N, 0, dz.dtype, "ieee"), configs.device_of(dz))
    launch(
        output_gradient_kernel,
        cdiv(M, tile.block_m) * cdiv(N, tile.block_n),
        dz.device,
        tile,
        dh, saved, dz, h, M, N, *dh.stride(),
        FORWARD=activation.forward,
        BACKWARD=activation.backward,
        PARAMETERS=activation.constants(dz.dtype),
        OFFSET=offset_type(dh, dz),
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def dgrad_kernel(
    dz_ptr,  # (M, N)
    w_ptr,  # (N, K)
    saved_ptr,  # (M, K), contiguous: what the layer below kept; None where it has no activation
    dx_ptr,  # (M, K), contiguous
    h_ptr,  # (M, K), contiguous: the layer below's output, rebuilt from its pre-activation; or None
    M,
    N,
    K,
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_position(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dx, _ = multiply(
        dz_ptr, w_ptr, rows, cols, M, K, 0, N,
        stride_dm, stride_dn, stride_wn, stride_wk,
        BLOCK_K, PRECISION, OFFSET, EVEN_K, False,
    )  # fmt: skip
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    offsets = rows.to(OFFSET)[:, None] * K + cols[None, :]
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(dx.dtype)
        if h_ptr is not None:
            store(h_ptr + offsets, activate(saved, FORWARD, PARAMETERS), mask)
        dx = differentiate(dx, saved, BACKWARD, PARAMETERS)
    store(dx_ptr + offsets, dx, mask)


def dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    dx: Tensor,
    h: Tensor | None,
    below: Activation,
    precision: str,
    tile: configs.TileConfig | None = None,
) -> None:
    """dx = (dz W) ⊙ a'(saved), and h = a(saved) where `h` is given (saved is then the pre-activation).

    Args:
        dz: (M, N), any strides, as is weight (N, K); M, N, K at least 1.
        saved: (M, K), contiguous, what the activation `below` kept; None for the identity.
        dx: (M, K), contiguous, written; h likewise, or None.
    """
    (M, N), K = dz.shape, weight.shape[1]
    assert weight.shape == (N, K)
    assert dx.shape == (M, K)
    assert dx.is_contiguous()
    assert saved is None or (saved.shape == dx.shape and saved.is_contiguous())
    assert h is None or (saved is not None and h.shape == dx.shape and h.is_contiguous())
    tile = tile or configs.choose(configs.Problem("dgrad", M, K, N, dz.dtype, precision), configs.device_of(dz))
    launch(
        dgrad_kernel,
        cdiv(M, tile.block_m) * cdiv(K, tile.block_n),
        dz.device,
        tile,
        dz, weight, saved, dx, h, M, N, K, *dz.stride(), *weight.stride(),
        FORWARD=below.forward,
        BACKWARD=below.backward,
        PARAMETERS=below.constants(dz.dtype),
        PRECISION=precision,
        OFFSET=offset_type(dz, weight, dx),
        EVEN_K=N % tile.block_k == 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "chunk"])
def wgrad_kernel(
    dz_ptr,  # (M, N)
    h_ptr,  # (M, K)
    dw_ptr,  # (splits, N, K), each split contiguous; None where only db is wanted
    db_ptr,  # (splits, N), each split contiguous; None where it is not wanted
    M,
    N,
    K,
    stride_dm,
    stride_dn,
    stride_hm,
    stride_hk,
    stride_split,  # of dw_ptr and db_ptr
    chunk,  # rows summed by one program
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of dW's rows, N
    BLOCK_N: tl.constexpr,  # of dW's columns, K
    BLOCK_K: tl.constexpr,  # of the rows that are summed, M
    GROUP_M: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    split = tl.program_id(0) // tiles
    tile_n, tile_k = tile_position(tl.program_id(0) % tiles, N, K, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split.to(OFFSET) * chunk
    dw, db = multiply(
        dz_ptr, h_ptr, rows, cols, N, K, begin, tl.minimum(begin + chunk, M),
        stride_dn, stride_dm, stride_hm, stride_hk,
        BLOCK_K, PRECISION, OFFSET, False, db_ptr is not None,
    )  # fmt: skip
    if dw_ptr is not None:
        offsets = split.to(OFFSET) * stride_split + rows.to(OFFSET)[:, None] * K + cols[None, :]
        store(dw_ptr + offsets, dw, (rows < N)[:, None] & (cols < K)[None, :])
    if db_ptr is not None:
        # Every program of a row of tiles holds the same sums; the first writes them.
        columns = tile_k + tl.arange(0, db.shape[1])[None, :]
        pointers = db_ptr + split.to(OFFSET) * stride_split + rows[:, None] + columns
        store(pointers, db, (rows < N)[:, None] & (columns == 0))


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # (splits, size), contiguous
    sum_ptrs,  # contiguous tensors, whose elements one after the other are the columns of partial
    starts,  # the column at which each begins, and the end
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
        store(sum_ptrs[i] + (cols - starts[i]), total, (cols >= starts[i]) & (cols < starts[i + 1]))


def sum_partials(partial: Tensor, sums: Sequence[Tensor]) -> None:
    """[sums …] = Σ_s partial[s], always in one order: the same bits every run.

    Args:
        partial: (splits, elements of all sums), contiguous.
        sums: contiguous, written, of any float dtype.
    """
    splits, size = partial.shape
    starts = tuple(itertools.accumulate((total.numel() for total in sums), initial=0))
    assert starts[-1] == size
    launch(
        sum_partials_kernel,
        cdiv(size, configs.SUM_PARTIALS.block_m),
        partial.device,
        configs.SUM_PARTIALS,
        partial, tuple(sums), starts, splits, size,
        OFFSET=offset_type(partial),
    )  # fmt: skip


def wgrad(
    dz: Tensor,
    h: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    precision: str,
    tile: configs.TileConfig | None = None,
) -> None:
    """dW = dzᵀ h and db = Σ_rows dz, each where it is given.

    Where dW has too few tiles to fill the device, the rows are split over programs, whose partial sums, in fp32, a
    second kernel adds in a fixed order.

    Args:
        dz: (M, N), any strides; M may be 0, which gives zeros.
        h: (M, K), any strides; None where only db is wanted.
        dw: (N, K), contiguous, written, of any float dtype; db (N,) likewise.
    """
    M, N = dz.shape
    K = 1 if dw is None else dw.shape[1]
    assert dw is None or (h is not None and h.shape == (M, K) and dw.shape == (N, K) and dw.is_contiguous())
    assert db is None or (db.shape == (N,) and db.is_contiguous())
    tile = tile or configs.choose(configs.Problem("wgrad", N, K, M, dz.dtype, precision), configs.device_of(dz))
    chunk = max(1, cdiv(cdiv(M, tile.split), tile.block_k)) * tile.block_k
    splits = max(1, cdiv(M, chunk))
    size_w, size_b = (0 if total is None else total.numel() for total in (dw, db))
    sums_w, sums_b = dw, db
    if splits > 1:
        accumulator = torch.float64 if dz.dtype == torch.float64 else torch.float32
        partial = torch.empty((splits, size_w + size_b), dtype=accumulator, device=dz.device)
        sums_w = None if dw is None else partial
        sums_b = None if db is None else partial[:, size_w:]
    h = dz if h is None else h  # not read where dw is None
    launch(
        wgrad_kernel,
        cdiv(N, tile.block_m) * cdiv(K, tile.block_n) * splits,
        dz.device,
        tile,
        dz, h, sums_w, sums_b, M, N, K, *dz.stride(), *h.stride(), size_w + size_b, chunk,
        PRECISION=precision,
        OFFSET=offset_type(dz, h, sums_w, sums_b),
    )  # fmt: skip
    if splits > 1:
        sum_partials(partial, [total for total in (dw, db) if total is not None])
