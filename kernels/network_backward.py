"""The backward of a narrow network in two launches: first every dz, then every dW and db. See network.py."""

from __future__ import annotations

from torch import Tensor

from .dropout import factors
from .language import tl, triton
from .launch import Launch, cdiv, launch
from .network import (
    Gradients,
    Network,
    activation_backward,
    dropout_arguments,
    load_rows,
    load_weight,
    matmul,
    multiply_back,
    network_offset_type,
    partial_dtype,
    store_rows,
)
from .partial_sums import Partial
from .tile import activate, multiply, round_to, store
from .tile_config import TileConfig

__all__ = ["network_dgrad", "network_wgrad", "network_wgrad_sums", "store_sums"]


@triton.jit(do_not_specialize=["M"])
def network_dgrad_kernel(
    dy_ptr,  # (M, d_L)
    dx_ptr,  # (M, d_0), contiguous; or None
    w_ptrs,
    kept_ptr,  # the saved tensors of the hidden layers, as the forward wrote them
    last_saved_ptr,  # (M, d_L), contiguous: the saved tensor of the last layer; None where it has no activation
    dz_ptr,  # dz of every hidden layer, laid out as kept_ptr, written
    last_dz_ptr,  # (M, d_L), contiguous, written: dz of the last layer; None where it equals dy
    seed_ptr,  # (1,), Dropout's seed; without Dropout this and the next are None
    keeps,  # for each layer, the probability that an element is kept; None where the layer has no Dropout
    M,
    stride_dm,
    stride_dn,
    NET: tl.constexpr,
    LOWEST: tl.constexpr,  # the lowest layer whose dz is wanted
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr = 0,  # columns of dx at a time, where the first layer is streamed
):
    LAST: tl.constexpr = len(w_ptrs) - 1
    # The first layer whose weight stays on the chip.
    FIRST: tl.constexpr = 0 if dx_ptr is not None and BLOCK_K == 0 else LOWEST + 1
    ws = ()
    for i in tl.static_range(FIRST, LAST + 1):
        ws = ws + (load_weight(w_ptrs[i], NET, i, OFFSET),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(OFFSET)
        inside = rows < M
        safe = tl.minimum(rows, M - 1)
        dz = load_rows(dy_ptr, safe * stride_dm, None, stride_dn, NET, LAST + 1, OFFSET)
        if last_dz_ptr is not None:
            last_saved = dz  # a placeholder: without an activation, no tensor is saved, and none is read
            if last_saved_ptr is not None:
                last_saved = load_rows(last_saved_ptr, safe * NET.widths[LAST + 1], None, 1, NET, LAST + 1, OFFSET)
            dz = activation_backward(dz, last_saved, seed_ptr, keeps, tile * BLOCK_M, NET, LAST)
            store_rows(last_dz_ptr, rows * NET.widths[LAST + 1], inside, dz, NET, LAST + 1)
        for i in tl.static_range(LAST, LOWEST, -1):
            start = M.to(OFFSET) * NET.starts[i - 1]
            dh = multiply_back(dz, ws[i - FIRST], NET, i, BLOCK_M)
            kept = load_rows(kept_ptr, start + safe * NET.widths[i], None, 1, NET, i, OFFSET)
            dz = activation_backward(dh, kept, seed_ptr, keeps, tile * BLOCK_M, NET, i - 1)
            store_rows(dz_ptr, start + rows * NET.widths[i], inside, dz, NET, i)
        if dx_ptr is not None and BLOCK_K == 0:
            store_rows(dx_ptr, rows * NET.widths[0], inside, multiply_back(dz, ws[0], NET, 0, BLOCK_M), NET, 0)
        if dx_ptr is not None and BLOCK_K > 0:
            w_rows = tl.arange(0, NET.pads[1])[:, None]
            for k in tl.range(0, NET.widths[0], BLOCK_K):
                ks = k + tl.arange(0, BLOCK_K)[None, :]
                ptrs = w_ptrs[0] + w_rows.to(OFFSET) * NET.strides[0][0] + ks.to(OFFSET) * NET.strides[0][1]
                w = tl.load(ptrs, mask=(w_rows < NET.widths[1]) & (ks < NET.widths[0]), other=0.0)
                dx = matmul(dz, round_to(w, NET.compute), tl.full([BLOCK_M, BLOCK_K], 0.0, NET.accumulator), NET)
                store(dx_ptr + rows * NET.widths[0] + ks, dx, inside & (ks < NET.widths[0]))


@triton.jit
def store_sums(ptr, dw, db, n, k, NET: tl.constexpr, GRADIENTS: tl.constexpr, LAYER: tl.constexpr):
    """Store dW and db, if they are wanted, among a program's partial sums; n and k are dW's first row and column."""
    N: tl.constexpr = NET.widths[LAYER + 1]
    K: tl.constexpr = NET.widths[LAYER]
    if GRADIENTS.weights[LAYER]:
        rows = n + tl.arange(0, dw.shape[0])[:, None]
        cols = k + tl.arange(0, dw.shape[1])[None, :]
        tl.store(ptr + GRADIENTS.weight_starts[LAYER] + rows * K + cols, dw, mask=(rows < N) & (cols < K))
    if GRADIENTS.biases[LAYER]:
        # All columns of a product with ones are equal. The first is written, by the first tile in a row of tiles.
        rows = n + tl.arange(0, db.shape[0])[:, None]
        cols = k + tl.arange(0, db.shape[1])[None, :]
        tl.store(ptr + GRADIENTS.bias_starts[LAYER] + rows + cols, db, mask=(rows < N) & (cols == 0))


@triton.jit(do_not_specialize=["M", "chunk"])
def network_wgrad_kernel(
    x_ptr,  # (M, d_0)
    last_dz_ptr,  # (M, d_L): dz of the last layer
    kept_ptr,  # the saved tensors, as the forward wrote them
    dz_ptr,  # dz of the hidden layers, as dgrad wrote it
    partial_ptr,  # (splits, size), contiguous
    seed_ptr,  # as in `network_dgrad_kernel`
    keeps,
    M,
    chunk,  # rows that one program sums
    size,
    stride_xm,
    stride_xk,
    stride_dm,
    stride_dn,
    NET: tl.constexpr,
    GRADIENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows at a time
):
    LAST: tl.constexpr = len(NET.widths) - 2
    split = tl.program_id(0) // GRADIENTS.tile_starts[LAST + 1]
    tile = tl.program_id(0) % GRADIENTS.tile_starts[LAST + 1]
    begin = split.to(OFFSET) * chunk
    end = tl.minimum(begin + chunk, M)
    partial_ptr += split.to(OFFSET) * size
    for i in tl.static_range(LAST + 1):
        if (tile >= GRADIENTS.tile_starts[i]) & (tile < GRADIENTS.tile_starts[i + 1]):
            which = tile - GRADIENTS.tile_starts[i]
            if i == LAST:
                dz = last_dz_ptr
                stride_zm = stride_dm
                stride_zn = stride_dn
            else:
                dz = dz_ptr + M.to(OFFSET) * NET.starts[i]
                stride_zm = NET.widths[i + 1]
                stride_zn = 1
            if i == 0:
                sum_layer(
                    dz, x_ptr, partial_ptr, seed_ptr, keeps, which, begin, end,
                    stride_zm, stride_zn, stride_xm, stride_xk, NET, GRADIENTS, i, OFFSET, BLOCK_K,
                )  # fmt: skip
            else:
                h = kept_ptr + M.to(OFFSET) * NET.starts[i - 1]
                sum_layer(
                    dz, h, partial_ptr, seed_ptr, keeps, which, begin, end,
                    stride_zm, stride_zn, NET.widths[i], 1, NET, GRADIENTS, i, OFFSET, BLOCK_K,
                )  # fmt: skip


@triton.jit
def sum_layer(
    dz_ptr, h_ptr, partial_ptr, seed_ptr, keeps, tile, begin, end, stride_zm, stride_zn, stride_hm, stride_hk,
    NET: tl.constexpr, GRADIENTS: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one tile of a layer's dW = dzᵀ h, and of db, summed over the rows begin <= m < end."""
    N: tl.constexpr = NET.widths[LAYER + 1]
    K: tl.constexpr = NET.widths[LAYER]
    TILES_K: tl.constexpr = tl.cdiv(NET.widths[LAYER], NET.sides[LAYER]) if GRADIENTS.weights[LAYER] else 1
    PRECISION: tl.constexpr = NET.precision
    SUM: tl.constexpr = GRADIENTS.biases[LAYER]
    COMPUTE: tl.constexpr = NET.compute
    FORWARD: tl.constexpr = NET.rebuilds[LAYER]
    PARAMETERS: tl.constexpr = NET.rebuild_parameters[LAYER]
    n = tile // TILES_K * NET.sides[LAYER + 1]
    k = tile % TILES_K * NET.sides[LAYER]
    if FORWARD is not None and NET.drops[LAYER - 1]:
        dw, db = multiply_dropped(
            dz_ptr, h_ptr, seed_ptr, keeps, n, k, begin, end, stride_zm, stride_zn, NET, LAYER, OFFSET, BLOCK_K, SUM
        )
    else:
        dw, db = multiply(
            dz_ptr, h_ptr, n, k, N, K, begin, end, stride_zn, stride_zm, stride_hk, stride_hm,
            NET.sides[LAYER + 1], NET.sides[LAYER], BLOCK_K, PRECISION, OFFSET, None, None, False, SUM,
            COMPUTE, FORWARD, PARAMETERS,
        )  # fmt: skip
    store_sums(partial_ptr, dw, db, n, k, NET, GRADIENTS, LAYER)


@triton.jit
def multiply_dropped(
    dz_ptr, z_ptr, seed_ptr, keeps, n, k, begin, end, stride_zm, stride_zn,
    NET: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """`multiply` for an input that has Dropout and whose z is saved: h = a(z) and the mask are computed again.

    (Σ dzᵀ h, Σ dz) over the rows begin <= m < end, (sides[LAYER + 1], sides[LAYER]) and (sides[LAYER + 1], 16 or 1).
    The columns of the second are equal.
    """
    N: tl.constexpr = NET.sides[LAYER + 1]
    ns = n + tl.arange(0, N)[None, :]
    ks = k + tl.arange(0, NET.sides[LAYER])[None, :]
    dw = tl.full([N, NET.sides[LAYER]], 0.0, NET.accumulator)
    db = tl.full([16 if NET.sums_by_dot else 1, N], 0.0, NET.accumulator)  # in equal rows
    for m in range(begin, end, BLOCK_K):
        rows = m + tl.arange(0, BLOCK_K)[:, None]
        dz_ptrs = dz_ptr + rows.to(OFFSET) * stride_zm + ns.to(OFFSET) * stride_zn
        dz = round_to(tl.load(dz_ptrs, mask=(rows < end) & (ns < NET.widths[LAYER + 1]), other=0.0), NET.compute)
        inside = (rows < end) & (ks < NET.widths[LAYER])
        z = tl.load(z_ptr + rows.to(OFFSET) * NET.widths[LAYER] + ks, mask=inside, other=0.0)
        FORWARD: tl.constexpr = NET.forwards[LAYER - 1]
        PARAMETERS: tl.constexpr = NET.parameters[LAYER - 1]
        h = activate(z.to(NET.accumulator), FORWARD, PARAMETERS)
        h *= factors(seed_ptr, keeps[LAYER - 1], LAYER - 1, m, k, BLOCK_K, NET.sides[LAYER])
        h = round_to(tl.where(inside, h, 0.0), NET.compute)  # a(0) need not be finite
        dw = matmul(tl.trans(dz), h, dw, NET)
        if SUM and NET.sums_by_dot:
            db = matmul(round_to(tl.full([16, BLOCK_K], 1.0, NET.accumulator), NET.compute), dz, db, NET)
        elif SUM:
            db += tl.sum(dz.to(NET.accumulator), axis=0)[None, :]
    return dw, tl.trans(db)


def network_wgrad_sums(rows: int, network: Network, gradients: Gradients, tile: TileConfig) -> Partial:
    """The partial sums of `network_wgrad`: one for each chunk of rows."""
    return Partial(cdiv(rows, _chunk(rows, gradients, tile)), gradients.starts[-1], 0, partial_dtype(network))


def _chunk(rows: int, gradients: Gradients, tile: TileConfig) -> int:
    """The rows that one program of `network_wgrad` sums, in whole blocks."""
    most = max(1, tile.programs // gradients.tile_starts[-1])
    return cdiv(cdiv(rows, most), tile.block_k) * tile.block_k


def network_dgrad(
    dy: Tensor,
    weights: tuple[Tensor, ...],
    kept: Tensor | None,
    last_saved: Tensor | None,
    dz: Tensor | None,
    last_dz: Tensor | None,
    dx: Tensor | None,
    network: Network,
    gradients: Gradients,
    tile: TileConfig,
    *,
    seed: Tensor | None = None,
    keeps: tuple[float | None, ...] | None = None,
) -> Launch | None:
    """Launch dz of every layer, from dy down to the lowest layer that needs a gradient, and dx.

    Args:
        dy: (M, d_L), any strides.
        kept: the saved tensors of the hidden layers, as `network_forward` wrote them.
        last_saved: (M, d_L), contiguous: the saved tensor of the last layer; None if it has no activation.
        dz: dz of the hidden layers, laid out as kept, written.
        last_dz: (M, d_L), contiguous: dz of the last layer, written; None if it equals dy.
        dx: (M, d_0), contiguous, written; or None.
        seed, keeps: as in `network_forward`.
    """
    rows = dy.shape[0]
    tensors, dropout_scalars = dropout_arguments((dy, dx, weights, kept, last_saved, dz, last_dz), seed, keeps)
    return launch(
        network_dgrad_kernel,
        tile.started(cdiv(rows, tile.block_m)),
        dy.device,
        tile,
        tensors,
        (*dropout_scalars, rows, *dy.stride()),
        NET=network,
        LOWEST=gradients.lowest,
        OFFSET=network_offset_type(network, rows, dy),
    )


def network_wgrad(
    x: Tensor,
    last_dz: Tensor,
    kept: Tensor | None,
    dz: Tensor | None,
    partial: Tensor,
    network: Network,
    gradients: Gradients,
    tile: TileConfig,
    *,
    seed: Tensor | None = None,
    keeps: tuple[float | None, ...] | None = None,
) -> Launch | None:
    """Launch the partial sums of every dW and db in `gradients`.

    Args:
        x: (M, d_0), any strides.
        last_dz: (M, d_L), any strides: dz of the last layer.
        kept, dz: as `network_forward` and `network_dgrad` wrote them.
        partial: written, in the shape of `network_wgrad_sums`; the input of `sum_partials`.
        seed, keeps: as in `network_forward`.
    """
    rows = x.shape[0]
    tensors, dropout_scalars = dropout_arguments((x, last_dz, kept, dz, partial), seed, keeps)
    return launch(
        network_wgrad_kernel,
        partial.shape[0] * gradients.tile_starts[-1],
        x.device,
        tile,
        tensors,
        (*dropout_scalars, rows, _chunk(rows, gradients, tile), partial.shape[1], *x.stride(), *last_dz.stride()),
        NET=network,
        GRADIENTS=gradients,
        OFFSET=network_offset_type(network, rows, x, last_dz),
    )
