"""The products of a layer in fp32, of operands that were split into planes: see planes.py.

h = a(x Wᵀ + b)                             forward_by_planes
dz_below = (dz W) ⊙ a_below'(saved_below)   dgrad_by_planes (and h_below again, where z_below was saved)
dW = dzᵀ h_below                            wgrad_by_planes

A program knows all elements of the blocks that it computes. So the epilogues also split h and dz, for the products that
read them, and sum the rows of dz for db. If nothing else reads h or dz in fp32, they are written as planes alone.

Each product is launched twice: with the tile's PRECISION, and with "redo" for the output tiles that meet a flag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tile_config
from .activation import Activation
from .dropout import Dropout, epilogue_parts, factors, layer_dropout_arguments, reads_output
from .language import tl, triton
from .launch import Launch, cdiv, describable, launch, offset_type
from .layer_backward import chunk_rows
from .partial_sums import Partial
from .planes import (
    SIDE,
    Operand,
    has_flags,
    matrix,
    meets_flags,
    multiply_operands,
    plane_operand,
    plane_targets,
    store_planes,
)
from .tile import activate, differentiate, load_tile, result, split_columns, store, store_tile, tile_position

__all__ = ["dgrad_by_planes", "forward_by_planes", "wgrad_by_planes"]


@triton.jit
def clear_outside(value, m, n, M, N):
    """A tile whose first row and column are m and n, with zeros beyond the (M, N) tensor."""
    rows, cols = m + tl.arange(0, value.shape[0]), n + tl.arange(0, value.shape[1])
    return tl.where((rows < M)[:, None] & (cols < N)[None, :], value, 0.0)


@triton.jit(do_not_specialize=["M", "layer"])
def forward_by_planes_kernel(
    x,  # (M, K), an `Operand`
    w,  # (N, K), an `Operand`
    b_ptr,  # (N,), or None
    h_ptr,  # (M, N), contiguous; None if h is needed as planes alone
    z_ptr,  # (M, N), contiguous, or None where the pre-activation is not saved
    split,  # (planes, info) of h for the next layer's forward, written; or None
    seed_ptr,  # (1,), Dropout's seed; without Dropout this and the next two are None
    keep,
    layer,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    FORWARD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DESCRIPTORS: tl.constexpr = PRECISION != "redo"
    PART_N: tl.constexpr = BLOCK_N // PARTS
    if PRECISION == "redo" and not (has_flags(x[1], M, K) | has_flags(w[1], N, K)):
        return
    xs = plane_operand(x, M, K, stride_xm, BLOCK_M, BLOCK_K, True, PRECISION)
    ws = plane_operand(w, N, K, stride_wn, BLOCK_N, BLOCK_K, True, PRECISION)
    if h_ptr is not None:
        hs = result(h_ptr, M, N, BLOCK_M, PART_N, DESCRIPTORS)
    if z_ptr is not None:
        zs = result(z_ptr, M, N, BLOCK_M, PART_N, DESCRIPTORS)
    if split is not None:
        targets = plane_targets(split[0], M, N, BLOCK_M, PART_N, 2, DESCRIPTORS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # A flattened loop loads a tile's first blocks while the tile before it ends.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        tile_m, tile_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m, first = tile_m * BLOCK_M, tile_n * BLOCK_N
        if PRECISION != "redo" or meets_flags(x[1], w[1], m, first, 0, K, M, N, K, True, True):
            product = multiply_operands(
                xs, ws, m, first, M, N, K, 0, K, stride_xm, stride_xk, stride_wn, stride_wk,
                BLOCK_M, BLOCK_N, BLOCK_K, True, True, False, PRECISION, OFFSET,
            )  # fmt: skip
            parts = split_columns(product, PARTS)
            block = ()
            for part in tl.static_range(PARTS):
                z = parts[part]
                n = first + part * PART_N
                if b_ptr is not None:
                    cols = n + tl.arange(0, PART_N)
                    z += tl.load(b_ptr + cols.to(OFFSET) * stride_bn, mask=cols < N, other=0.0)[None, :]
                if z_ptr is not None:
                    store_tile(zs, z, m, n, M, N, OFFSET, DESCRIPTORS)
                h = activate(z, FORWARD, PARAMETERS)
                if seed_ptr is not None:
                    h *= factors(seed_ptr, keep, layer, m, n, BLOCK_M, PART_N)
                if h_ptr is not None:
                    store_tile(hs, h, m, n, M, N, OFFSET, DESCRIPTORS)
                if split is not None:
                    block += (clear_outside(h, m, n, M, N),)
            if split is not None:
                store_planes(block, targets, split[1], m, first, M, N, "rows", False, 2, OFFSET, DESCRIPTORS)


def forward_by_planes(
    x: Operand,
    weight: Operand,
    bias: Tensor | None,
    h: Tensor | None,
    z: Tensor | None,
    activation: Activation,
    tile: tile_config.TileConfig,
    split: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """Launch h = a(x Wᵀ + b), and z = x Wᵀ + b if `z` is given. `dropout` is applied to h.

    Args:
        x, weight: (M, K) and (N, K), split along their rows, each block with one exponent.
        bias: (N,), any stride; or None.
        h: (M, N), contiguous, written; or None. z: as h.
        tile: with the PRECISION of the planes, or the result of `redo_tile`.
        split: (planes, info), written: h, split along its rows, each block with one exponent; or None.

    Returns the launch, as `layer_forward` does.
    """
    x_matrix, weight_matrix = matrix(x), matrix(weight)
    (M, K), N = x_matrix.shape, weight_matrix.shape[0]
    assert weight_matrix.shape == (N, K)
    assert all(tensor is None or (tensor.shape == (M, N) and tensor.is_contiguous()) for tensor in (h, z))
    assert split is None or is_whole_blocks(tile)
    assert not tile.descriptors or describable(x_matrix, weight_matrix, h, z)
    tensors, dropout_scalars = layer_dropout_arguments((x, weight, bias, h, z, split), seed, dropout)
    return launch(
        forward_by_planes_kernel,
        tile.started(cdiv(M, tile.block_m) * cdiv(N, tile.block_n)),
        x_matrix.device,
        tile,
        tensors,
        (*dropout_scalars, M, N, K, *x_matrix.stride(), *weight_matrix.stride(), 0 if bias is None else bias.stride(0)),
        FORWARD=activation.forward,
        PARAMETERS=activation.constants(torch.float32),
        PRECISION=tile.precision,
        OFFSET=offset_type(x_matrix, weight_matrix, bias, h, z, split and matrix(split)),
        PARTS=epilogue_parts(tile, dropout),
    )


def is_whole_blocks(tile: tile_config.TileConfig) -> bool:
    """True if an output tile is one block of planes."""
    return tile.block_m == tile.block_n == SIDE


@triton.jit(do_not_specialize=["M", "layer"])
def dgrad_by_planes_kernel(
    dz,  # (M, N), an `Operand`
    w,  # (N, K), an `Operand`
    saved_ptr,  # (M, K), contiguous: the tensor that the layer below saved; None where it has no activation
    dx_ptr,  # (M, K), contiguous; None if dx is needed as planes alone
    h_ptr,  # (M, K), contiguous: the layer below's output, rebuilt from its pre-activation; or None
    by_rows,  # (planes, info) of dx for dgrad below, written; or None
    by_columns,  # (planes, info, sums of each block over its rows) of dx for wgrad below, written; or None
    seed_ptr,  # as in `forward_by_planes_kernel`, of the layer below
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
    READS_OUTPUT: tl.constexpr,  # True if z was saved, but BACKWARD reads the output
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # along dx's columns, K
    BLOCK_K: tl.constexpr,  # along the reduction, N
    GROUP_M: tl.constexpr,
):
    DESCRIPTORS: tl.constexpr = PRECISION != "redo"
    PART_N: tl.constexpr = BLOCK_N // PARTS
    if PRECISION == "redo" and not (has_flags(dz[1], M, N) | has_flags(w[1], N, K)):
        return
    dzs = plane_operand(dz, M, N, stride_dm, BLOCK_M, BLOCK_K, True, PRECISION)
    ws = plane_operand(w, K, N, stride_wn, BLOCK_N, BLOCK_K, False, PRECISION)
    if dx_ptr is not None:
        dxs = result(dx_ptr, M, K, BLOCK_M, PART_N, DESCRIPTORS)
    if saved_ptr is not None:
        kept = result(saved_ptr, M, K, BLOCK_M, PART_N, DESCRIPTORS)
    if h_ptr is not None:
        hs = result(h_ptr, M, K, BLOCK_M, PART_N, DESCRIPTORS)
    if by_rows is not None:
        rows_targets = plane_targets(by_rows[0], M, K, BLOCK_M, PART_N, 2, DESCRIPTORS)
    if by_columns is not None:
        columns_targets = plane_targets(by_columns[0], M, K, BLOCK_M, PART_N, 2, DESCRIPTORS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    # Not flattened where dx is split: the code for a tile's end would stand in the loop twice, and its buffers with it.
    FLATTEN: tl.constexpr = DESCRIPTORS and by_rows is None and by_columns is None
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_position(tile, M, K, BLOCK_M, BLOCK_N, GROUP_M)
        m, first = tile_m * BLOCK_M, tile_n * BLOCK_N
        if PRECISION != "redo" or meets_flags(dz[1], w[1], m, first, 0, N, M, K, N, True, False):
            product = multiply_operands(
                dzs, ws, m, first, M, K, N, 0, N, stride_dm, stride_dn, stride_wk, stride_wn,
                BLOCK_M, BLOCK_N, BLOCK_K, True, False, True, PRECISION, OFFSET,
            )  # fmt: skip
            parts = split_columns(product, PARTS)
            block = ()
            for part in tl.static_range(PARTS):
                dx = parts[part]
                n = first + part * PART_N
                if seed_ptr is not None:
                    left = factors(seed_ptr, keep, layer, m, n, BLOCK_M, PART_N)
                    dx *= left
                if saved_ptr is not None:
                    saved = load_tile(kept, m, n, M, K, BLOCK_M, PART_N, OFFSET, DESCRIPTORS)
                    if h_ptr is not None:
                        h = activate(saved, FORWARD, PARAMETERS)
                        if seed_ptr is not None:
                            h *= left
                        store_tile(hs, h, m, n, M, K, OFFSET, DESCRIPTORS)
                    if READS_OUTPUT:
                        saved = activate(saved, FORWARD, PARAMETERS)
                    dx = differentiate(dx, saved, BACKWARD, PARAMETERS)
                if dx_ptr is not None:
                    store_tile(dxs, dx, m, n, M, K, OFFSET, DESCRIPTORS)
                if by_rows is not None or by_columns is not None:
                    block += (clear_outside(dx, m, n, M, K),)
            if by_rows is not None:
                store_planes(block, rows_targets, by_rows[1], m, first, M, K, "rows", True, 2, OFFSET, DESCRIPTORS)
            if by_columns is not None:
                store_planes(
                    block, columns_targets, by_columns[1], m, first, M, K, "columns", True, 2, OFFSET, DESCRIPTORS
                )
                for part in tl.static_range(PARTS):
                    cols = first + part * PART_N + tl.arange(0, PART_N)
                    tl.store(by_columns[2] + tile_m.to(OFFSET) * K + cols, tl.sum(block[part], axis=0), mask=cols < K)


def dgrad_by_planes(
    dz: Operand,
    weight: Operand,
    saved: Tensor | None,
    dx: Tensor | None,
    h: Tensor | None,
    below: Activation,
    tile: tile_config.TileConfig,
    by_rows: tuple[Tensor, Tensor] | None = None,
    by_columns: tuple[Tensor, Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """Launch dx = (dz W) ⊙ a'(saved), and h = a(saved) if `h` is given. `saved` is then z.

    Args:
        dz: (M, N), split along its rows, each with an exponent of its own.
        weight: (N, K), split along its columns, each block with one exponent.
        saved: (M, K), contiguous: the tensor saved for the activation `below`; None for the identity.
        dx: (M, K), contiguous, written; or None. h: as dx.
        by_rows: (planes, info), written: dx, split along its rows, each with an exponent of its own; or None.
        by_columns: (planes, info, sums), written: dx, split along its columns, each with an exponent of its own, and
            the sums of each block over its rows, as `planes.split` writes them; or None.
        dropout: the Dropout of the layer below.
    """
    dz_matrix, weight_matrix = matrix(dz), matrix(weight)
    (M, N), K = dz_matrix.shape, weight_matrix.shape[1]
    assert weight_matrix.shape == (N, K)
    assert all(tensor is None or (tensor.shape == (M, K) and tensor.is_contiguous()) for tensor in (saved, dx, h))
    assert saved is not None or h is None
    assert (by_rows is None and by_columns is None) or is_whole_blocks(tile)
    assert not tile.descriptors or describable(dz_matrix, weight_matrix, saved, dx, h)
    written = (by_rows and by_rows[0][0], by_columns and by_columns[0][0])
    tensors, dropout_scalars = layer_dropout_arguments((dz, weight, saved, dx, h, by_rows, by_columns), seed, dropout)
    return launch(
        dgrad_by_planes_kernel,
        tile.started(cdiv(M, tile.block_m) * cdiv(K, tile.block_n)),
        dz_matrix.device,
        tile,
        tensors,
        (*dropout_scalars, M, N, K, *dz_matrix.stride(), *weight_matrix.stride()),
        FORWARD=below.forward,
        BACKWARD=below.backward,
        PARAMETERS=below.constants(torch.float32),
        READS_OUTPUT=reads_output(below, dropout),
        PRECISION=tile.precision,
        OFFSET=offset_type(dz_matrix, weight_matrix, saved, dx, h, *written),
        PARTS=epilogue_parts(tile, dropout),
    )


@triton.jit(do_not_specialize=["M", "chunk", "splits"])
def wgrad_by_planes_kernel(
    dz,  # (M, N), an `Operand`
    h,  # (M, K), an `Operand`
    dw_ptr,  # (splits, N, K), each split contiguous
    M,
    N,
    K,
    stride_dm,
    stride_dn,
    stride_hm,
    stride_hk,
    stride_split,  # elements from one split to the next
    chunk,  # rows that one program sums; whole blocks
    splits,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,  # along dW's rows, N
    BLOCK_N: tl.constexpr,  # along dW's columns, K
    BLOCK_K: tl.constexpr,  # along the rows that are summed, M
    GROUP_M: tl.constexpr,
):
    if PRECISION == "redo" and not (has_flags(dz[1], M, N) | has_flags(h[1], M, K)):
        return
    dzs = plane_operand(dz, N, M, stride_dm, BLOCK_M, BLOCK_K, False, PRECISION)
    hs = plane_operand(h, K, M, stride_hm, BLOCK_N, BLOCK_K, False, PRECISION)
    tiles = tl.cdiv(N, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    for item in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        tile_n, tile_k = tile_position(item % tiles, N, K, BLOCK_M, BLOCK_N, GROUP_M)
        n, k = tile_n * BLOCK_M, tile_k * BLOCK_N
        part = (item // tiles).to(OFFSET)
        begin = part.to(tl.int32) * chunk
        end = begin + tl.minimum(chunk, M - begin)  # begin + chunk may be more than 32 bits hold
        if PRECISION != "redo" or meets_flags(dz[1], h[1], n, k, begin, end, N, K, M, False, False):
            dw = multiply_operands(
                dzs, hs, n, k, N, K, M, begin, end, stride_dn, stride_dm, stride_hk, stride_hm,
                BLOCK_M, BLOCK_N, BLOCK_K, False, False, True, PRECISION, OFFSET,
            )  # fmt: skip
            rows, cols = n + tl.arange(0, BLOCK_M)[:, None], k + tl.arange(0, BLOCK_N)[None, :]
            store(dw_ptr + part * stride_split + rows.to(OFFSET) * K + cols, dw, (rows < N) & (cols < K))


def wgrad_by_planes(
    dz: Operand, h: Operand, dw: Tensor, tile: tile_config.TileConfig, partial: Partial
) -> Launch | None:
    """Launch dW = dzᵀ h, or its partial sums if the rows are split, as `wgrad_products` does.

    Args:
        dz: (M, N), split along its columns, each with an exponent of its own. The launch that splits it also sums the
            rows of each block, for db.
        h: (M, K), split along its columns, each block with one exponent.
        dw: (N, K), contiguous, written, of any float dtype. If rows are split: the view of the partial sums.
        partial: the result of `wgrad_sums`.
    """
    dz_matrix, h_matrix = matrix(dz), matrix(h)
    (M, N), K = dz_matrix.shape, h_matrix.shape[1]
    assert not tile.descriptors or describable(dz_matrix, h_matrix)
    return launch(
        wgrad_by_planes_kernel,
        tile.started(cdiv(N, tile.block_m) * cdiv(K, tile.block_n) * partial.splits),
        dz_matrix.device,
        tile,
        (dz, h, dw),
        (
            *(M, N, K, *dz_matrix.stride(), *h_matrix.stride()),
            *(partial.columns if partial.splits > 1 else 0, chunk_rows(M, tile), partial.splits),
        ),
        PRECISION=tile.precision,
        OFFSET=offset_type(dz_matrix, h_matrix, dw),
    )
