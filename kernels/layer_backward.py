"""The backward by layer kernels: output_gradient for the last layer, then dgrad and wgrad for every layer.

dz = dh ⊙ a'(saved)                           output_gradient (and h again, where z was saved)
dz_below = (dz W) ⊙ a_below'(saved_below)     dgrad (and h_below again, where z_below was saved)
dW = dzᵀ h_below,  db = Σ_rows dz             wgrad

Where Dropout follows an activation, its mask is applied to the gradient too, and to an h that is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import devices, layer_tiles, tile_config
from .activation import Activation
from .dropout import Dropout, epilogue_parts, factors, layer_dropout_arguments, reads_output
from .language import tl, triton
from .launch import Launch, by_columns, cdiv, describable, launch, offset_type
from .partial_sums import Partial, sum_partials
from .tile import (
    activate,
    differentiate,
    load_tile,
    multiply,
    operand,
    result,
    round_to,
    split_columns,
    store,
    store_tile,
    tile_position,
)

__all__ = ["chunk_rows", "dgrad", "output_gradient", "wgrad", "wgrad_products", "wgrad_sums"]


@triton.jit(do_not_specialize=["M", "layer"])
def output_gradient_kernel(
    dh_ptr,  # (M, N)
    saved_ptr,  # (M, N), contiguous; None where there is no activation
    dz_ptr,  # (M, N), contiguous; may be dh
    h_ptr,  # (M, N), contiguous: the output, rebuilt from its pre-activation; or None
    seed_ptr,  # (1,), Dropout's seed; without Dropout this and the next two are None
    keep,
    layer,
    M,
    N,
    stride_dm,
    stride_dn,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    READS_OUTPUT: tl.constexpr,  # True if z was saved, but BACKWARD reads the output
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
    if seed_ptr is not None:
        left = factors(seed_ptr, keep, layer, tile_m * BLOCK_M, tile_n * BLOCK_N, BLOCK_M, BLOCK_N)
        dh *= left
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
        if h_ptr is not None:
            h = activate(saved, FORWARD, PARAMETERS)
            if seed_ptr is not None:
                h *= left
            store(h_ptr + offsets, h, mask)
        if READS_OUTPUT:
            saved = round_to(activate(saved, FORWARD, PARAMETERS), dz_ptr.dtype.element_ty).to(DTYPE)
        dh = differentiate(dh, saved, BACKWARD, PARAMETERS)
    store(dz_ptr + offsets, dh, mask)


def output_gradient(
    dh: Tensor,
    saved: Tensor | None,
    dz: Tensor,
    activation: Activation,
    tile: tile_config.TileConfig | None = None,
    h: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """Launch dz = dh ⊙ a'(saved), and h = a(saved) if `h` is given. `saved` is then the pre-activation. All are (M, N).

    Args:
        dh: any strides, 0 included; with `dropout`, the gradient of its output.
        saved: contiguous; None for the identity.
        dz: contiguous, written; may be dh itself. h: contiguous, written; or None.

    Returns the launch, as `layer_forward` does.
    """
    M, N = dh.shape
    assert dz.shape == (M, N)
    assert dz.is_contiguous()
    assert saved is None or (saved.shape == (M, N) and saved.is_contiguous())
    assert h is None or (h.shape == (M, N) and h.is_contiguous())
    tile = tile or layer_tiles.choose(
        tile_config.Problem("output_gradient", M, N, 0, dz.dtype, "ieee"), devices.device_record(dz)
    )
    tensors, dropout_scalars = layer_dropout_arguments((dh, saved, dz, h), seed, dropout)
    return launch(
        output_gradient_kernel,
        cdiv(M, tile.block_m) * cdiv(N, tile.block_n),
        dz.device,
        tile,
        tensors,
        (*dropout_scalars, M, N, *dh.stride()),
        FORWARD=activation.forward,
        BACKWARD=activation.backward,
        PARAMETERS=activation.constants(dz.dtype),
        READS_OUTPUT=reads_output(activation, dropout),
        OFFSET=offset_type(dh, dz),
    )


@triton.jit(do_not_specialize=["M", "layer"])
def dgrad_kernel(
    dz_ptr,  # (M, N)
    w_ptr,  # (N, K)
    saved_ptr,  # (M, K), contiguous: the tensor that the layer below saved; None where it has no activation
    dx_ptr,  # (M, K), contiguous
    h_ptr,  # (M, K), contiguous: the layer below's output, rebuilt from its pre-activation; or None
    seed_ptr,  # as in `output_gradient_kernel`, of the layer below
    keep,
    layer,
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
    READS_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_N: tl.constexpr,
    DZ_BY_N: tl.constexpr,  # True if dz is contiguous along N, to load by a descriptor; None: load by pointers
    W_BY_N: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,  # True if the saved tile is loaded before the products, and waits in registers
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # along dx's columns, K
    BLOCK_K: tl.constexpr,  # along the reduction, N
    GROUP_M: tl.constexpr,
):
    DESCRIPTORS: tl.constexpr = DZ_BY_N is not None
    PART_N: tl.constexpr = BLOCK_N // PARTS
    dz = operand(dz_ptr, M, N, stride_dm, stride_dn, BLOCK_M, BLOCK_K, DZ_BY_N)
    w = operand(w_ptr, K, N, stride_wk, stride_wn, BLOCK_N, BLOCK_K, W_BY_N)
    dxs = result(dx_ptr, M, K, BLOCK_M, PART_N, DESCRIPTORS)
    if saved_ptr is not None:
        kept = result(saved_ptr, M, K, BLOCK_M, PART_N, DESCRIPTORS and not EARLY)
    if h_ptr is not None:
        hs = result(h_ptr, M, K, BLOCK_M, PART_N, DESCRIPTORS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    # With EARLY the loop is not flattened: a flattened one would hold a waiting tile for every pipeline stage.
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0),
        flatten=DESCRIPTORS and not (EARLY or WARP_SPECIALIZE), warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        tile_m, tile_n = tile_position(tile, M, K, BLOCK_M, BLOCK_N, GROUP_M)
        m = tile_m * BLOCK_M
        if EARLY and saved_ptr is not None:
            whole = load_tile(kept, m, tile_n * BLOCK_N, M, K, BLOCK_M, BLOCK_N, OFFSET, False)
            waiting = split_columns(whole, PARTS)
        product, _ = multiply(
            dz, w, m, tile_n * BLOCK_N, M, K, 0, N, stride_dm, stride_dn, stride_wk, stride_wn,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, OFFSET, DZ_BY_N, W_BY_N, EVEN_N, False,
        )  # fmt: skip
        parts = split_columns(product, PARTS)
        for part in tl.static_range(PARTS):
            dx = parts[part]
            n = tile_n * BLOCK_N + part * PART_N
            if seed_ptr is not None:
                left = factors(seed_ptr, keep, layer, m, n, BLOCK_M, PART_N)
                dx *= left
            if saved_ptr is not None:
                if EARLY:
                    saved = waiting[part].to(dx.dtype)
                else:
                    saved = load_tile(kept, m, n, M, K, BLOCK_M, PART_N, OFFSET, DESCRIPTORS).to(dx.dtype)
                if h_ptr is not None:
                    h = activate(saved, FORWARD, PARAMETERS)
                    if seed_ptr is not None:
                        h *= left
                    store_tile(hs, h, m, n, M, K, OFFSET, DESCRIPTORS)
                if READS_OUTPUT:
                    saved = round_to(activate(saved, FORWARD, PARAMETERS), dx_ptr.dtype.element_ty).to(dx.dtype)
                dx = differentiate(dx, saved, BACKWARD, PARAMETERS)
            store_tile(dxs, dx, m, n, M, K, OFFSET, DESCRIPTORS)


def dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    dx: Tensor,
    h: Tensor | None,
    below: Activation,
    precision: str,
    tile: tile_config.TileConfig | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """Launch dx = (dz W) ⊙ a'(saved), and h = a(saved) if `h` is given. `saved` is then the pre-activation.

    Args:
        dz, weight: (M, N) and (N, K), any strides; M, N, K at least 1.
        saved: (M, K), contiguous: the tensor saved for the activation `below`; None for the identity.
        dx: (M, K), contiguous, written. h: (M, K), contiguous, written; or None.
        dropout: the Dropout of the layer below.
    """
    (M, N), K = dz.shape, weight.shape[1]
    assert weight.shape == (N, K)
    assert dx.shape == (M, K)
    assert dx.is_contiguous()
    assert saved is None or (saved.shape == dx.shape and saved.is_contiguous())
    assert h is None or (saved is not None and h.shape == dx.shape and h.is_contiguous())
    aligned = describable(dz, weight, saved, dx, h)
    tile = tile or layer_tiles.choose(
        tile_config.Problem("dgrad", M, K, N, dx.dtype, precision, aligned, below.name), devices.device_record(dx)
    )
    assert aligned or not tile.descriptors
    tensors, dropout_scalars = layer_dropout_arguments((dz, weight, saved, dx, h), seed, dropout)
    return launch(
        dgrad_kernel,
        tile.started(cdiv(M, tile.block_m) * cdiv(K, tile.block_n)),
        dx.device,
        tile,
        tensors,
        (*dropout_scalars, M, N, K, *dz.stride(), *weight.stride()),
        FORWARD=below.forward,
        BACKWARD=below.backward,
        PARAMETERS=below.constants(dx.dtype),
        READS_OUTPUT=reads_output(below, dropout),
        PRECISION=tile.precision,
        OFFSET=offset_type(dz, weight, dx),
        EVEN_N=N % tile.block_k == 0,
        DZ_BY_N=by_columns(dz) if tile.descriptors else None,
        W_BY_N=not by_columns(weight) if tile.descriptors else None,
        PARTS=epilogue_parts(tile, dropout),
        EARLY=tile.early,
        WARP_SPECIALIZE=tile.warp_specialize,
    )


@triton.jit(do_not_specialize=["M", "chunk", "splits"])
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
    stride_split,  # elements from one split to the next, in dw_ptr and db_ptr
    chunk,  # rows that one program sums; whole blocks
    splits,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    DZ_BY_M: tl.constexpr,  # True if dz is contiguous along M, to load by a descriptor; None: load by pointers
    H_BY_M: tl.constexpr,
    BLOCK_M: tl.constexpr,  # along dW's rows, N
    BLOCK_N: tl.constexpr,  # along dW's columns, K
    BLOCK_K: tl.constexpr,  # along the rows that are summed, M
    GROUP_M: tl.constexpr,
):
    dz = operand(dz_ptr, N, M, stride_dn, stride_dm, BLOCK_M, BLOCK_K, DZ_BY_M)
    h = operand(h_ptr, K, M, stride_hk, stride_hm, BLOCK_N, BLOCK_K, H_BY_M)
    tiles = tl.cdiv(N, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    for item in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        tile_n, tile_k = tile_position(item % tiles, N, K, BLOCK_M, BLOCK_N, GROUP_M)
        split = (item // tiles).to(OFFSET)
        begin = split.to(tl.int32) * chunk
        end = begin + tl.minimum(chunk, M - begin)  # begin + chunk may be more than 32 bits hold
        start = split * stride_split
        # Only the first tile in a row of tiles also sums db.
        if db_ptr is not None and tile_k == 0:
            sum_rows(
                dz, h, dw_ptr, db_ptr, start, tile_n, tile_k, begin, end, N, K,
                stride_dn, stride_dm, stride_hk, stride_hm,
                PRECISION, OFFSET, DZ_BY_M, H_BY_M, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sum_rows(
                dz, h, dw_ptr, None, start, tile_n, tile_k, begin, end, N, K,
                stride_dn, stride_dm, stride_hk, stride_hm,
                PRECISION, OFFSET, DZ_BY_M, H_BY_M, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def sum_rows(
    dz, h, dw_ptr, db_ptr, start, tile_n, tile_k, begin, end, N, K, stride_dn, stride_dm, stride_hk, stride_hm,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, DZ_BY_M: tl.constexpr, H_BY_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one tile of dW, and of db if it is given, summed over the rows begin <= m < end, at offset `start`."""
    n, k = tile_n * BLOCK_M, tile_k * BLOCK_N
    dw, db = multiply(
        dz, h, n, k, N, K, begin, end, stride_dn, stride_dm, stride_hk, stride_hm,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, OFFSET, DZ_BY_M, H_BY_M, False, db_ptr is not None,
    )  # fmt: skip
    rows = n + tl.arange(0, BLOCK_M)[:, None]
    cols = k + tl.arange(0, BLOCK_N)[None, :]
    if dw_ptr is not None:
        store(dw_ptr + start + rows.to(OFFSET) * K + cols, dw, (rows < N) & (cols < K))
    if db_ptr is not None:
        store(db_ptr + start + rows, db, rows < N)


def wgrad_sums(rows: int, tile: tile_config.TileConfig, dtype: torch.dtype, size_w: int, size_b: int) -> Partial:
    """The partial sums of `wgrad`: one for each chunk of rows. With one chunk, the rows are not split."""
    splits = max(1, cdiv(rows, chunk_rows(rows, tile)))
    return Partial(splits, size_w, size_b, torch.float64 if dtype == torch.float64 else torch.float32)


def chunk_rows(rows: int, tile: tile_config.TileConfig) -> int:
    """The rows that one program sums, in whole blocks."""
    return max(1, cdiv(cdiv(rows, tile.split), tile.block_k)) * tile.block_k


def wgrad_products(
    dz: Tensor,
    h: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    width_in: int,
    tile: tile_config.TileConfig,
    partial: Partial,
) -> Launch | None:
    """Launch dW = dzᵀ h and db = Σ_rows dz, or their partial sums if the rows are split.

    If dW has too few tiles to fill the device, the rows are split between programs. Each writes a partial sum in fp32
    (in fp64 for fp64 operands), and a second kernel adds the partial sums in a fixed order.

    Args:
        dz: (M, N), any strides; M may be 0, which gives zeros.
        h: (M, K), any strides; not read if only db is wanted.
        dw: (N, K), contiguous, written, of any float dtype; or None. If rows are split: the view of the partial sums
            that begins with those of dW.
        db: (N,), as dw.
        width_in: K; 1 if only db is wanted.
        partial: the result of `wgrad_sums`.
    """
    h = dz if h is None else h
    (M, N), K = dz.shape, width_in
    assert describable(dz, h) or not tile.descriptors
    return launch(
        wgrad_kernel,
        tile.started(cdiv(N, tile.block_m) * cdiv(K, tile.block_n) * partial.splits),
        dz.device,
        tile,
        (dz, h, dw, db),
        (
            *(M, N, K, *dz.stride(), *h.stride()),
            *(partial.columns if partial.splits > 1 else 0, chunk_rows(M, tile), partial.splits),
        ),
        PRECISION=tile.precision,
        OFFSET=offset_type(dz, h, dw, db),
        DZ_BY_M=not by_columns(dz) if tile.descriptors else None,
        H_BY_M=not by_columns(h) if tile.descriptors else None,
    )


def wgrad(
    dz: Tensor,
    h: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    precision: str,
    tile: tile_config.TileConfig | None = None,
) -> None:
    """Launch dW = dzᵀ h if `dw` is given and db = Σ_rows dz if `db` is, and add the partial sums if rows are split.

    Args:
        dz: (M, N), any strides; M may be 0, which gives zeros.
        h: (M, K), any strides; None if only db is wanted.
        dw: (N, K), contiguous, written, of any float dtype; or None. db: (N,), as dw.
    """
    M, N = dz.shape
    K = 1 if dw is None else dw.shape[1]
    assert dw is None or (h is not None and h.shape == (M, K) and dw.shape == (N, K) and dw.is_contiguous())
    assert db is None or (db.shape == (N,) and db.is_contiguous())
    aligned = describable(dz, h)
    problem = tile_config.Problem("wgrad", N, K, M, dz.dtype, precision, aligned)
    tile = tile or layer_tiles.choose(problem, devices.device_record(dz))
    partial = wgrad_sums(M, tile, dz.dtype, *(0 if total is None else total.numel() for total in (dw, db)))
    if partial.splits == 1:
        wgrad_products(dz, h, dw, db, K, tile, partial)
        return
    whole, sums_w, sums_b = partial.allocate(dz.device)
    wgrad_products(dz, h, sums_w, sums_b, K, tile, partial)
    sum_partials(whole, tuple(total for total in (dw, db) if total is not None), partial.starts)
