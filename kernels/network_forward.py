"""The forward of a narrow network in one launch: see network.py."""

from __future__ import annotations

from torch import Tensor

from .language import tl, triton
from .launch import Launch, cdiv, launch
from .network import (
    Network,
    dropout_arguments,
    layer,
    linear,
    linear_streamed,
    load_rows,
    load_weight,
    network_offset_type,
    store_rows,
)
from .tile_config import TileConfig

__all__ = ["network_forward"]


@triton.jit(do_not_specialize=["M"])
def network_forward_kernel(
    x_ptr,  # (M, d_0)
    y_ptr,  # (M, d_L), contiguous
    w_ptrs,  # (d_l, d_{l-1}) for each layer
    b_ptrs,  # (d_l,) for each layer; or None
    kept_ptr,  # the saved tensors, (M, d_l) for each hidden layer, one after the other, contiguous; or None
    z_ptr,  # (M, d_L), contiguous: the last pre-activation; None where it is not saved
    h_ptr,  # every hidden H, laid out as kept_ptr, for tests; or None
    seed_ptr,  # (1,), Dropout's seed; without Dropout this and the next are None
    keeps,  # for each layer, the probability that an element is kept; None where the layer has no Dropout
    M,
    stride_xm,
    stride_xk,
    NET: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr = 0,  # columns of x at a time, where the first layer is streamed
):
    LAST: tl.constexpr = len(w_ptrs) - 1
    FIRST: tl.constexpr = 1 if BLOCK_K > 0 else 0  # the first layer whose weight stays on the chip
    ws = ()
    for i in tl.static_range(FIRST, LAST + 1):
        ws = ws + (load_weight(w_ptrs[i], NET, i, OFFSET),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(OFFSET)
        inside = rows < M
        offsets = tl.minimum(rows, M - 1) * stride_xm  # a tile that is not full loads the last row again
        if BLOCK_K > 0:
            z = linear_streamed(x_ptr, offsets, w_ptrs[0], b_ptrs[0], stride_xk, NET, BLOCK_M, BLOCK_K, OFFSET)
        else:
            h = load_rows(x_ptr, offsets, None, stride_xk, NET, 0, OFFSET)
            z = linear(h, ws[0], b_ptrs[0], NET, 0, BLOCK_M, OFFSET)
        for i in tl.static_range(LAST):
            kept, h = layer(z, seed_ptr, keeps, tile * BLOCK_M, NET, i, NET.merges[i])
            start = M.to(OFFSET) * NET.starts[i] + rows * NET.widths[i + 1]
            if kept_ptr is not None:
                store_rows(kept_ptr, start, inside, kept, NET, i + 1)
            if h_ptr is not None:
                store_rows(h_ptr, start, inside, h, NET, i + 1)
            z = linear(h, ws[i + 1 - FIRST], b_ptrs[i + 1], NET, i + 1, BLOCK_M, OFFSET)
        kept, h = layer(z, seed_ptr, keeps, tile * BLOCK_M, NET, LAST, NET.merges[LAST])
        if z_ptr is not None:
            store_rows(z_ptr, rows * NET.widths[LAST + 1], inside, kept, NET, LAST + 1)
        store_rows(y_ptr, rows * NET.widths[LAST + 1], inside, h, NET, LAST + 1)


def network_forward(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    y: Tensor,
    network: Network,
    tile: TileConfig,
    *,
    kept: Tensor | None = None,
    z: Tensor | None = None,
    h: Tensor | None = None,
    seed: Tensor | None = None,
    keeps: tuple[float | None, ...] | None = None,
) -> Launch | None:
    """Launch y = H_L, and write the tensors to save for backward if they are given.

    Args:
        x: (M, d_0), any strides and real dtype; M at least 1. It may lie in pinned memory of the host.
        weights, biases: (d_l, d_{l-1}) and (d_l,) for each layer, with the network's strides, of any float dtype.
        y: (M, d_L), contiguous, written, as are `kept`, `z` and `h`.
        kept: the saved tensors, (M, d_l) for each hidden layer, one after the other: M Σ d_l elements.
        z: (M, d_L), the last pre-activation.
        h: the output of every hidden layer, laid out as kept, to compare with the ones that a backward recomputes.
        seed: (1,), int64, for a network with Dropout, as in all launchers.
        keeps: for each layer, 1 - p; None where it has no Dropout. Given together with `seed`.

    Returns the launch, as `launch` does.
    """
    rows = x.shape[0]
    tensors, dropout_scalars = dropout_arguments((x, y, weights, biases, kept, z, h), seed, keeps)
    return launch(
        network_forward_kernel,
        tile.started(cdiv(rows, tile.block_m)),
        y.device,
        tile,
        tensors,
        (*dropout_scalars, rows, *x.stride()),
        NET=network,
        OFFSET=network_offset_type(network, rows, x),
    )
