"""h = a(x Wᵀ + b): the forward of one layer, with bias, activation and dropout in the epilogue of one GEMM.

`pointwise` computes h = a(z) alone, where PyTorch has computed the product.
"""

from __future__ import annotations

from torch import Tensor

from . import devices, layer_tiles, tile_config
from .activation import Activation
from .dropout import Dropout, epilogue_parts, factors, layer_dropout_arguments, saves_preactivation
from .language import tl, triton
from .launch import Launch, by_columns, cdiv, describable, launch, offset_type
from .tile import activate, multiply, operand, result, round_to, split_columns, store, store_tile, tile_position

__all__ = ["layer_forward", "pointwise"]


@triton.jit(do_not_specialize=["M", "layer"])
def layer_forward_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    b_ptr,  # (N,), or None
    h_ptr,  # (M, N), contiguous
    z_ptr,  # (M, N), contiguous, or None where the pre-activation is not saved
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
    ROUND_Z: tl.constexpr,  # True if the activation reads z rounded to the dtype, as it is saved
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_BY_K: tl.constexpr,  # True if x is contiguous along K, to load by a descriptor; None: load by pointers
    W_BY_K: tl.constexpr,
    PARTS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DESCRIPTORS: tl.constexpr = X_BY_K is not None
    PART_N: tl.constexpr = BLOCK_N // PARTS
    x = operand(x_ptr, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, X_BY_K)
    w = operand(w_ptr, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, W_BY_K)
    hs = result(h_ptr, M, N, BLOCK_M, PART_N, DESCRIPTORS)
    if z_ptr is not None:
        zs = result(z_ptr, M, N, BLOCK_M, PART_N, DESCRIPTORS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # A flattened loop loads a tile's first blocks while the tile before it ends.
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0),
        flatten=DESCRIPTORS and not WARP_SPECIALIZE, warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        tile_m, tile_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m = tile_m * BLOCK_M
        product, _ = multiply(
            x, w, m, tile_n * BLOCK_N, M, N, 0, K, stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, OFFSET, X_BY_K, W_BY_K, EVEN_K, False,
        )  # fmt: skip
        parts = split_columns(product, PARTS)
        for part in tl.static_range(PARTS):
            z = parts[part]
            n = tile_n * BLOCK_N + part * PART_N
            if b_ptr is not None:
                cols = n + tl.arange(0, PART_N)
                z += tl.load(b_ptr + cols.to(OFFSET) * stride_bn, mask=cols < N, other=0.0).to(z.dtype)[None, :]
            if ROUND_Z:
                z = round_to(z, h_ptr.dtype.element_ty).to(z.dtype)
            if z_ptr is not None:
                store_tile(zs, z, m, n, M, N, OFFSET, DESCRIPTORS)
            h = activate(z, FORWARD, PARAMETERS)
            if seed_ptr is not None:
                h *= factors(seed_ptr, keep, layer, m, n, BLOCK_M, PART_N)
            store_tile(hs, h, m, n, M, N, OFFSET, DESCRIPTORS)


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    z: Tensor | None,
    activation: Activation,
    precision: str,
    tile: tile_config.TileConfig | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """Launch h = a(x Wᵀ + b), and z = x Wᵀ + b if `z` is given. `dropout` is applied to h.

    Args:
        x, weight, bias: (M, K), (N, K) and (N,), any strides; bias may be None; M, N, K at least 1.
        h: (M, N), contiguous, written. z: (M, N), contiguous, written; or None.
        precision: torch's setting for fp32, "ieee" or "tf32".
        tile: the tile to use; None: the choice of `layer_tiles.choose`.
        seed: (1,), int64, given together with `dropout`, as in all launchers.

    Returns:
        The launch, which can be repeated on other tensors of these shapes, strides and dtypes. A seed is the last of
        its tensors. See `launch`.
    """
    (M, K), N = x.shape, weight.shape[0]
    assert weight.shape == (N, K)
    assert h.shape == (M, N)
    assert h.is_contiguous()
    assert z is None or (z.shape == h.shape and z.is_contiguous())
    aligned = describable(x, weight, h, z)
    tile = tile or layer_tiles.choose(
        tile_config.Problem("forward", M, N, K, h.dtype, precision, aligned, activation.name),
        devices.device_record(h),
    )
    assert aligned or not tile.descriptors
    tensors, dropout_scalars = layer_dropout_arguments((x, weight, bias, h, z), seed, dropout)
    return launch(
        layer_forward_kernel,
        tile.started(cdiv(M, tile.block_m) * cdiv(N, tile.block_n)),
        h.device,
        tile,
        tensors,
        (*dropout_scalars, M, N, K, *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)),
        FORWARD=activation.forward,
        PARAMETERS=activation.constants(h.dtype),
        ROUND_Z=saves_preactivation(activation, dropout),
        PRECISION=tile.precision,
        OFFSET=offset_type(x, weight, bias, h),
        EVEN_K=K % tile.block_k == 0,
        X_BY_K=by_columns(x) if tile.descriptors else None,
        W_BY_K=by_columns(weight) if tile.descriptors else None,
        PARTS=epilogue_parts(tile, dropout),
        WARP_SPECIALIZE=tile.warp_specialize,
    )


@triton.jit(do_not_specialize=["M", "layer"])
def pointwise_kernel(
    z_ptr,  # (M, N), contiguous
    h_ptr,  # (M, N), contiguous; may be z
    seed_ptr,  # as in `layer_forward_kernel`
    keep,
    layer,
    M,
    N,
    FORWARD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, 1)
    rows = tile_m.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
    h = activate(z, FORWARD, PARAMETERS)
    if seed_ptr is not None:
        h *= factors(seed_ptr, keep, layer, tile_m * BLOCK_M, tile_n * BLOCK_N, BLOCK_M, BLOCK_N)
    store(h_ptr + offsets, h, mask)


def pointwise(
    z: Tensor,
    h: Tensor,
    activation: Activation,
    tile: tile_config.TileConfig | None = None,
    seed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Launch | None:
    """Launch h = a(z), with `dropout` applied to h. Both are (M, N), contiguous; h is written, and may be z itself."""
    M, N = z.shape
    assert h.shape == (M, N)
    assert z.is_contiguous()
    assert h.is_contiguous()
    # The same tile as the other pointwise kernel, output_gradient.
    tile = tile or layer_tiles.choose(
        tile_config.Problem("output_gradient", M, N, 0, h.dtype, "ieee"), devices.device_record(h)
    )
    tensors, dropout_scalars = layer_dropout_arguments((z, h), seed, dropout)
    return launch(
        pointwise_kernel,
        cdiv(M, tile.block_m) * cdiv(N, tile.block_n),
        h.device,
        tile,
        tensors,
        (*dropout_scalars, M, N),
        FORWARD=activation.forward,
        PARAMETERS=activation.constants(h.dtype),
        OFFSET=offset_type(h),
    )
