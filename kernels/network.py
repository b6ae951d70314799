"""A narrow network in one kernel: H_l = a_l(H_{l-1} W_lᵀ + b_l) for every layer, activations never leaving the chip.

forward      x -> y in one launch; in training it may keep one tensor of each hidden layer
recompute    x, dy -> dx and every dW and db: the forward again, then the chain of dz, a program's sums in registers
dgrad        the same chain of dz from the tensors that the forward kept, dx at its end
wgrad        every dW and db from the kept tensors and the chain's dz

recompute and wgrad leave fp32 sums of each program's rows, which `sum_partials` adds in a fixed order.

A program loads the weights once and goes through tiles of rows. Widths are filled up to the next power of two: weights
with zeros, activations with zeros too, as a(0) need not be 0, nor finite.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .language import tl, triton
from .launch import Launch, cdiv, launch, offset_type
from .layer_backward import Partial, sum_partials
from .network_tiles import TileConfig, padded
from .tile import activate, differentiate, dot, multiply, round_to, store

__all__ = ["Gradients", "Network", "dgrad", "forward", "gradients_of", "network_of", "recompute", "wgrad"]

WGRAD_TILE = 128  # rows and columns of dW that one program sums, at most


@dataclass(frozen=True, eq=False)
class Network:
    """What the kernels are compiled for: one object a network, by `network_of`.

    Layer i maps width i to width i + 1.
    """

    widths: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]  # of each layer: W's rows, W's columns, b
    activations: tuple[Activation, ...]
    dtype: torch.dtype
    precision: str  # how fp32 is multiplied: "ieee" or "tf32"

    # Derived, as the kernels read them.
    pads: tuple[int, ...] = field(init=False)  # widths filled up
    sides: tuple[int, ...] = field(init=False)  # of dW's tile at each width
    starts: tuple[int, ...] = field(init=False)  # elements a row of kept tensors before each hidden layer's
    keeps_z: tuple[bool, ...] = field(init=False)
    forwards: tuple[Any, ...] = field(init=False)
    backwards: tuple[Any, ...] = field(init=False)
    parameters: tuple[tuple[float, ...], ...] = field(init=False)
    rebuilds: tuple[Any, ...] = field(init=False)  # what gives a layer's input from what is kept; None: it is kept
    rebuild_parameters: tuple[tuple[float, ...], ...] = field(init=False)
    activates_output: bool = field(init=False)
    sums_by_dot: bool = field(init=False)  # db as a product with ones: on tensor cores only, and exact in 16 bits only
    compute: Any = field(init=False)
    accumulator: Any = field(init=False)
    cache_key: str = field(init=False)

    def __post_init__(self) -> None:
        pads = tuple(padded(width) for width in self.widths)
        derived = {
            "pads": pads,
            "sides": tuple(min(pad, WGRAD_TILE) for pad in pads),
            "starts": tuple(itertools.accumulate(self.widths[1:-1], initial=0)),
            "keeps_z": tuple(activation.keeps_preactivation for activation in self.activations),
            "forwards": tuple(activation.forward for activation in self.activations),
            "backwards": tuple(activation.backward for activation in self.activations),
            "parameters": tuple(activation.constants(self.dtype) for activation in self.activations),
            "rebuilds": (None, *(a.forward if a.keeps_preactivation else None for a in self.activations[:-1])),
            "rebuild_parameters": ((), *(a.constants(self.dtype) for a in self.activations[:-1])),
            "activates_output": self.activations[-1].name != "identity",
            "sums_by_dot": self.dtype.itemsize == 2,
            "compute": getattr(tl, str(self.dtype).removeprefix("torch.")),
            "accumulator": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        # Compiled kernels are found on disk by the text of their constants; a function's is its source.
        sources = [getattr(f, "cache_key", "") for f in (*derived["forwards"], *derived["backwards"])]
        values = [derived[name] for name in ("sides", "keeps_z", "parameters", "activates_output")]
        key = (self.widths, self.strides, self.dtype, self.precision, values, sources)
        object.__setattr__(self, "cache_key", str(key))

    def __repr__(self) -> str:
        return self.cache_key

    @property
    def layers(self) -> int:
        return len(self.activations)

    @functools.cached_property
    def row_elements(self) -> int:
        """Elements a row of the largest tensor that has rows."""
        return max(*self.widths, self.starts[-1])

    @functools.cached_property
    def is_wide(self) -> bool:
        """Whether a parameter is so spread out in memory that offsets into it need 64 bits."""
        spans = (n * sn + k * sk for n, k, (sn, sk, _) in zip(self.widths[1:], self.widths, self.strides))
        return max(*spans, *(n * sb for n, (_, _, sb) in zip(self.widths[1:], self.strides))) >= 2**31


@functools.lru_cache(maxsize=1024)
def network_of(
    widths: tuple[int, ...],
    strides: tuple[tuple[int, int, int], ...],
    activations: tuple[Activation, ...],
    dtype: torch.dtype,
    precision: str,
) -> Network:
    """The one object for a network, so that kernels are found by identity."""
    return Network(widths, strides, activations, dtype, precision)


@dataclass(frozen=True)
class Gradients:
    """Which gradients a backward computes, and where each one's partial sums begin in a program's."""

    weights: tuple[bool, ...]
    biases: tuple[bool, ...]
    lowest: int  # the lowest layer that anything is wanted of
    weight_starts: tuple[int, ...]
    bias_starts: tuple[int, ...]
    starts: tuple[int, ...]  # of all that are wanted, layer by layer, the weight first; and the end
    tile_starts: tuple[int, ...]  # the first program of each layer in `wgrad`, and the end


@functools.lru_cache(maxsize=1024)
def gradients_of(
    widths: tuple[int, ...], weights: tuple[bool, ...], biases: tuple[bool, ...], input: bool
) -> Gradients:
    """The gradients wanted of a network, by layer; and of its input."""
    wanted = [weight or bias for weight, bias in zip(weights, biases)]
    lowest = 0 if input else wanted.index(True) if True in wanted else len(wanted)
    sizes, tiles = [], []
    for k, n, weight, bias in zip(widths, widths[1:], weights, biases):
        sizes += [n * k * weight, n * bias]
        blocks_n, blocks_k = (cdiv(width, min(padded(width), WGRAD_TILE)) for width in (n, k))
        tiles.append(blocks_n * (blocks_k if weight else 1) if weight or bias else 0)
    ends = list(itertools.accumulate(sizes, initial=0))
    return Gradients(
        weights,
        biases,
        lowest,
        tuple(ends[0:-1:2]),
        tuple(ends[1::2]),
        (*(start for start, size in zip(ends, sizes) if size), ends[-1]),
        tuple(itertools.accumulate(tiles, initial=0)),
    )


@triton.jit
def matmul(a, b, acc, NET: tl.constexpr):
    """acc + a b."""
    PRECISION: tl.constexpr = NET.precision
    return dot(a, b, acc, PRECISION)


@triton.jit
def load_rows(ptr, offsets, mask, stride, NET: tl.constexpr, AT: tl.constexpr, OFFSET: tl.constexpr):
    """Rows as wide as NET's width AT, rounded to its dtype. offsets and mask (None: all) are the rows', (rows, 1)."""
    cols = tl.arange(0, NET.pads[AT])[None, :]
    ptrs = ptr + offsets + cols.to(OFFSET) * stride
    if NET.pads[AT] > NET.widths[AT]:
        inside = cols < NET.widths[AT] if mask is None else mask & (cols < NET.widths[AT])
        rows = tl.load(ptrs, mask=inside, other=0.0)
    elif mask is None:
        rows = tl.load(ptrs)
    else:
        rows = tl.load(ptrs, mask=mask, other=0.0)
    return round_to(rows, NET.compute)


@triton.jit
def store_rows(ptr, offsets, mask, rows, NET: tl.constexpr, AT: tl.constexpr):
    """Rows as wide as NET's width AT, their columns contiguous."""
    cols = tl.arange(0, NET.pads[AT])[None, :]
    if NET.pads[AT] > NET.widths[AT]:
        mask = mask & (cols < NET.widths[AT])
    store(ptr + offsets + cols, rows, mask)


@triton.jit
def clear_padding(rows, NET: tl.constexpr, AT: tl.constexpr):
    """Zeros in the columns beyond NET's width AT."""
    if NET.pads[AT] > NET.widths[AT]:
        rows = tl.where(tl.arange(0, NET.pads[AT])[None, :] < NET.widths[AT], rows, 0.0)
    return rows


@triton.jit
def load_weight(ptr, NET: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr):
    """W, (d_l, d_{l-1}) filled up."""
    rows = tl.arange(0, NET.pads[LAYER + 1])[:, None]
    offsets = rows.to(OFFSET) * NET.strides[LAYER][0]
    mask = rows < NET.widths[LAYER + 1] if NET.pads[LAYER + 1] > NET.widths[LAYER + 1] else None
    return load_rows(ptr, offsets, mask, NET.strides[LAYER][1], NET, LAYER, OFFSET)


@triton.jit
def broadcast_bias(ptr, NET: tl.constexpr, LAYER: tl.constexpr, BLOCK_M: tl.constexpr, OFFSET: tl.constexpr):
    """b in every row, or zeros: what z is added to.

    Read where it is used, from cache: biases held over the loop cost more registers than they have elements.
    """
    z = tl.full([BLOCK_M, NET.pads[LAYER + 1]], 0.0, NET.accumulator)
    if ptr is not None:
        cols = tl.arange(0, NET.pads[LAYER + 1])
        ptrs = ptr + cols.to(OFFSET) * NET.strides[LAYER][2]
        if NET.pads[LAYER + 1] > NET.widths[LAYER + 1]:
            bias = tl.load(ptrs, mask=cols < NET.widths[LAYER + 1], other=0.0)
        else:
            bias = tl.load(ptrs)
        z += bias.to(NET.accumulator)[None, :]
    return z


@triton.jit
def linear(h, w, b_ptr, NET: tl.constexpr, LAYER: tl.constexpr, BLOCK_M: tl.constexpr, OFFSET: tl.constexpr):
    """z = h Wᵀ + b."""
    return matmul(h, tl.trans(w), broadcast_bias(b_ptr, NET, LAYER, BLOCK_M, OFFSET), NET)


@triton.jit
def linear_streamed(
    x_ptr, offsets, w_ptr, b_ptr, stride_xk, NET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """The first layer's z = x Wᵀ + b, from x and W by BLOCK_K columns at a time."""
    z = broadcast_bias(b_ptr, NET, 0, BLOCK_M, OFFSET)
    rows = tl.arange(0, NET.pads[1])[:, None]
    for k in tl.range(0, NET.widths[0], BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + offsets + ks.to(OFFSET) * stride_xk, mask=ks < NET.widths[0], other=0.0)
        ptrs = w_ptr + rows.to(OFFSET) * NET.strides[0][0] + ks.to(OFFSET) * NET.strides[0][1]
        w = tl.load(ptrs, mask=(rows < NET.widths[1]) & (ks < NET.widths[0]), other=0.0)
        z = matmul(round_to(x, NET.compute), tl.trans(round_to(w, NET.compute)), z, NET)
    return z


@triton.jit
def layer(z, NET: tl.constexpr, LAYER: tl.constexpr):
    """(kept, h) from z: h = a(z), and the one tensor that is kept of the layer, h itself or z.

    The forward and the backward that recomputes it both go through here: they see the same bits.
    """
    FORWARD: tl.constexpr = NET.forwards[LAYER]
    PARAMETERS: tl.constexpr = NET.parameters[LAYER]
    if NET.keeps_z[LAYER]:
        kept = round_to(z, NET.compute)
        h = activate(kept.to(z.dtype), FORWARD, PARAMETERS)
        return kept, round_to(clear_padding(h, NET, LAYER + 1), NET.compute)
    else:
        h = activate(z, FORWARD, PARAMETERS)
        h = round_to(clear_padding(h, NET, LAYER + 1), NET.compute)
        return h, h


@triton.jit
def through(dh, kept, NET: tl.constexpr, LAYER: tl.constexpr):
    """dz = dh ⊙ a'(kept)."""
    BACKWARD: tl.constexpr = NET.backwards[LAYER]
    PARAMETERS: tl.constexpr = NET.parameters[LAYER]
    dz = differentiate(dh.to(NET.accumulator), kept.to(NET.accumulator), BACKWARD, PARAMETERS)
    return round_to(clear_padding(dz, NET, LAYER + 1), NET.compute)


@triton.jit
def multiply_back(dz, w, NET: tl.constexpr, LAYER: tl.constexpr, BLOCK_M: tl.constexpr):
    """dh of the layer below: dz W."""
    return matmul(dz, w, tl.full([BLOCK_M, NET.pads[LAYER]], 0.0, NET.accumulator), NET)


@triton.jit(do_not_specialize=["M"])
def network_forward_kernel(
    x_ptr,  # (M, d_0)
    y_ptr,  # (M, d_L), contiguous
    w_ptrs,  # of each layer (d_l, d_{l-1})
    b_ptrs,  # of each layer (d_l,), or None
    kept_ptr,  # of each hidden layer (M, d_l), contiguous, one after the other; None where nothing is kept
    z_ptr,  # (M, d_L), contiguous: the last pre-activation; None where it is not kept
    h_ptr,  # as kept_ptr, every hidden H, for tests; or None
    M,
    stride_xm,
    stride_xk,
    NET: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr = 0,  # of the first layer, where it is streamed
):
    LAST: tl.constexpr = len(w_ptrs) - 1
    FIRST: tl.constexpr = 1 if BLOCK_K > 0 else 0  # the first layer whose weight is held
    ws = ()
    for i in tl.static_range(FIRST, LAST + 1):
        ws = ws + (load_weight(w_ptrs[i], NET, i, OFFSET),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(OFFSET)
        inside = rows < M
        offsets = tl.minimum(rows, M - 1) * stride_xm  # beyond the last row, the last row again
        if BLOCK_K > 0:
            z = linear_streamed(x_ptr, offsets, w_ptrs[0], b_ptrs[0], stride_xk, NET, BLOCK_M, BLOCK_K, OFFSET)
        else:
            h = load_rows(x_ptr, offsets, None, stride_xk, NET, 0, OFFSET)
            z = linear(h, ws[0], b_ptrs[0], NET, 0, BLOCK_M, OFFSET)
        for i in tl.static_range(LAST):
            kept, h = layer(z, NET, i)
            start = M.to(OFFSET) * NET.starts[i] + rows * NET.widths[i + 1]
            if kept_ptr is not None:
                store_rows(kept_ptr, start, inside, kept, NET, i + 1)
            if h_ptr is not None:
                store_rows(h_ptr, start, inside, h, NET, i + 1)
            z = linear(h, ws[i + 1 - FIRST], b_ptrs[i + 1], NET, i + 1, BLOCK_M, OFFSET)
        kept, h = layer(z, NET, LAST)
        if z_ptr is not None:
            store_rows(z_ptr, rows * NET.widths[LAST + 1], inside, kept, NET, LAST + 1)
        store_rows(y_ptr, rows * NET.widths[LAST + 1], inside, h, NET, LAST + 1)


@triton.jit(do_not_specialize=["M"])
def network_recompute_kernel(
    x_ptr,  # (M, d_0)
    dy_ptr,  # (M, d_L)
    dx_ptr,  # (M, d_0), contiguous; or None
    w_ptrs,
    b_ptrs,
    h_ptr,  # as the forward's, for tests; or None
    partial_ptr,  # (programs, size), contiguous: every wanted dW and db, by GRADIENTS' starts
    M,
    size,
    stride_xm,
    stride_xk,
    stride_dm,
    stride_dn,
    NET: tl.constexpr,
    GRADIENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of ones that db is a product with
):
    LAST: tl.constexpr = len(w_ptrs) - 1
    LOWEST: tl.constexpr = GRADIENTS.lowest
    ws = ()
    for i in tl.static_range(LAST + 1):
        ws = ws + (load_weight(w_ptrs[i], NET, i, OFFSET),)
    dws, dbs = (), ()
    for i in tl.static_range(LOWEST, LAST + 1):
        dws = dws + (tl.full([NET.pads[i + 1], NET.pads[i]] if GRADIENTS.weights[i] else [1, 1], 0.0, NET.accumulator),)
        dbs = dbs + (tl.full([NET.pads[i + 1], BLOCK_N] if GRADIENTS.biases[i] else [1, 1], 0.0, NET.accumulator),)
    ones = round_to(tl.full([BLOCK_M, BLOCK_N], 1.0, NET.accumulator), NET.compute)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(OFFSET)
        inside = rows < M
        safe = tl.minimum(rows, M - 1)
        hs = (load_rows(x_ptr, safe * stride_xm, None, stride_xk, NET, 0, OFFSET),)
        # Of the rows beyond the last, no gradient: they add nothing to any sum.
        dz = load_rows(dy_ptr, safe * stride_dm, inside, stride_dn, NET, LAST + 1, OFFSET)
        kept = ()
        for i in tl.static_range(LAST):
            of_layer, h = layer(linear(hs[i], ws[i], b_ptrs[i], NET, i, BLOCK_M, OFFSET), NET, i)
            kept = kept + (of_layer,)
            hs = hs + (h,)
            if h_ptr is not None:
                start = M.to(OFFSET) * NET.starts[i] + rows * NET.widths[i + 1]
                store_rows(h_ptr, start, inside, h, NET, i + 1)
        if NET.activates_output:
            own, h = layer(linear(hs[LAST], ws[LAST], b_ptrs[LAST], NET, LAST, BLOCK_M, OFFSET), NET, LAST)
            dz = through(dz, own, NET, LAST)
        sums_w, sums_b = (), ()
        for i in tl.static_range(LAST, LOWEST - 1, -1):
            dw = dws[i - LOWEST]
            db = dbs[i - LOWEST]
            if GRADIENTS.weights[i]:
                dw = matmul(tl.trans(dz), hs[i], dw, NET)
            if GRADIENTS.biases[i] and NET.sums_by_dot:
                db = matmul(tl.trans(dz), ones, db, NET)
            elif GRADIENTS.biases[i]:
                db += tl.sum(dz.to(NET.accumulator), axis=0)[:, None]
            sums_w = (dw,) + sums_w
            sums_b = (db,) + sums_b
            if i > LOWEST:
                dz = through(multiply_back(dz, ws[i], NET, i, BLOCK_M), kept[i - 1], NET, i - 1)
        if dx_ptr is not None:
            store_rows(dx_ptr, rows * NET.widths[0], inside, multiply_back(dz, ws[0], NET, 0, BLOCK_M), NET, 0)
        dws = sums_w
        dbs = sums_b
    partial_ptr += tl.program_id(0).to(OFFSET) * size
    for i in tl.static_range(LOWEST, LAST + 1):
        store_sums(partial_ptr, dws[i - LOWEST], dbs[i - LOWEST], 0, 0, NET, GRADIENTS, i)


@triton.jit
def store_sums(ptr, dw, db, n, k, NET: tl.constexpr, GRADIENTS: tl.constexpr, LAYER: tl.constexpr):
    """The wanted ones of dW and db to their places among a program's sums; n and k are dW's first row and column."""
    N: tl.constexpr = NET.widths[LAYER + 1]
    K: tl.constexpr = NET.widths[LAYER]
    if GRADIENTS.weights[LAYER]:
        rows = n + tl.arange(0, dw.shape[0])[:, None]
        cols = k + tl.arange(0, dw.shape[1])[None, :]
        tl.store(ptr + GRADIENTS.weight_starts[LAYER] + rows * K + cols, dw, mask=(rows < N) & (cols < K))
    if GRADIENTS.biases[LAYER]:
        # The columns of a product with ones are all alike; the first is written, by the first of a row of tiles.
        rows = n + tl.arange(0, db.shape[0])[:, None]
        cols = k + tl.arange(0, db.shape[1])[None, :]
        tl.store(ptr + GRADIENTS.bias_starts[LAYER] + rows + cols, db, mask=(rows < N) & (cols == 0))


@triton.jit(do_not_specialize=["M"])
def network_dgrad_kernel(
    dy_ptr,  # (M, d_L)
    dx_ptr,  # (M, d_0), contiguous; or None
    w_ptrs,
    kept_ptr,  # as the forward's
    own_ptr,  # (M, d_L), contiguous: what is kept of the last layer; None where it has no activation
    dz_ptr,  # as kept_ptr, written
    last_ptr,  # (M, d_L), contiguous, written: the last layer's dz; None where it is dy
    M,
    stride_dm,
    stride_dn,
    NET: tl.constexpr,
    LOWEST: tl.constexpr,  # the lowest layer whose dz is wanted
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr = 0,  # of dx, where the first layer is streamed
):
    LAST: tl.constexpr = len(w_ptrs) - 1
    # The first layer whose weight is held.
    FIRST: tl.constexpr = 0 if dx_ptr is not None and BLOCK_K == 0 else LOWEST + 1
    ws = ()
    for i in tl.static_range(FIRST, LAST + 1):
        ws = ws + (load_weight(w_ptrs[i], NET, i, OFFSET),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(OFFSET)
        inside = rows < M
        safe = tl.minimum(rows, M - 1)
        dz = load_rows(dy_ptr, safe * stride_dm, None, stride_dn, NET, LAST + 1, OFFSET)
        if own_ptr is not None:
            own = load_rows(own_ptr, safe * NET.widths[LAST + 1], None, 1, NET, LAST + 1, OFFSET)
            dz = through(dz, own, NET, LAST)
            store_rows(last_ptr, rows * NET.widths[LAST + 1], inside, dz, NET, LAST + 1)
        for i in tl.static_range(LAST, LOWEST, -1):
            start = M.to(OFFSET) * NET.starts[i - 1]
            dh = multiply_back(dz, ws[i - FIRST], NET, i, BLOCK_M)
            kept = load_rows(kept_ptr, start + safe * NET.widths[i], None, 1, NET, i, OFFSET)
            dz = through(dh, kept, NET, i - 1)
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


@triton.jit(do_not_specialize=["M", "chunk"])
def network_wgrad_kernel(
    x_ptr,  # (M, d_0)
    dy_ptr,  # (M, d_L): the last layer's dz
    kept_ptr,  # as the forward's
    dz_ptr,  # as the chain's
    partial_ptr,  # (splits, size), contiguous
    M,
    chunk,  # rows summed by one program
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
                dz = dy_ptr
                stride_zm = stride_dm
                stride_zn = stride_dn
            else:
                dz = dz_ptr + M.to(OFFSET) * NET.starts[i]
                stride_zm = NET.widths[i + 1]
                stride_zn = 1
            if i == 0:
                sum_layer(
                    dz, x_ptr, partial_ptr, which, begin, end, stride_zm, stride_zn, stride_xm, stride_xk,
                    NET, GRADIENTS, i, OFFSET, BLOCK_K,
                )  # fmt: skip
            else:
                h = kept_ptr + M.to(OFFSET) * NET.starts[i - 1]
                sum_layer(
                    dz, h, partial_ptr, which, begin, end, stride_zm, stride_zn, NET.widths[i], 1,
                    NET, GRADIENTS, i, OFFSET, BLOCK_K,
                )  # fmt: skip


@triton.jit
def sum_layer(
    dz_ptr, h_ptr, partial_ptr, tile, begin, end, stride_zm, stride_zn, stride_hm, stride_hk,
    NET: tl.constexpr, GRADIENTS: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a layer's dW = dzᵀ h, and db, over the rows begin <= m < end."""
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
    dw, db = multiply(
        dz_ptr, h_ptr, n, k, N, K, begin, end, stride_zn, stride_zm, stride_hk, stride_hm,
        NET.sides[LAYER + 1], NET.sides[LAYER], BLOCK_K, PRECISION, OFFSET, None, None, False, SUM,
        COMPUTE, FORWARD, PARAMETERS,
    )  # fmt: skip
    store_sums(partial_ptr, dw, db, n, k, NET, GRADIENTS, LAYER)


def forward(
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
) -> Launch | None:
    """y = H_L, and what is kept for backward where tensors for it are given.

    Args:
        x: (M, d_0), any strides and real dtype; M at least 1. It may lie in pinned memory of the host.
        weights, biases: of each layer (d_l, d_{l-1}) and (d_l,), by the network's strides, of any float dtype.
        y: (M, d_L), contiguous, written, as are all that follow.
        kept: M Σ d_l elements over the hidden layers: of each in turn (M, d_l).
        z: (M, d_L), the last pre-activation.
        h: as kept, every hidden layer's output, to compare with what a backward recomputes.

    Returns what `launch` does.
    """
    rows = x.shape[0]
    return launch(
        network_forward_kernel,
        tile.started(cdiv(rows, tile.block_m)),
        y.device,
        tile,
        (x, y, weights, biases, kept, z, h),
        (rows, *x.stride()),
        NET=network,
        OFFSET=_offset_type(network, rows, x),
    )


def recompute(
    x: Tensor,
    dy: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    dx: Tensor | None,
    sums: Sequence[Tensor],
    network: Network,
    gradients: Gradients,
    tile: TileConfig,
    *,
    h: Tensor | None = None,
) -> Summing | None:
    """dx, and every dW and db that `gradients` names, from x and dy alone.

    Args:
        x, weights, biases, h: as in `forward`; dy (M, d_L), any strides.
        dx: (M, d_0), contiguous, written; or None.
        sums: the wanted ones of dW_1, db_1, dW_2 …, contiguous, written, of any float dtype.
    """
    rows = x.shape[0]
    programs = tile.started(cdiv(rows, tile.block_m))
    partial = Partial(programs, gradients.starts[-1], 0, _accumulator(network))
    whole, *_ = partial.allocate(x.device)
    kernel = launch(
        network_recompute_kernel,
        programs,
        x.device,
        tile,
        (x, dy, dx, weights, biases, h, whole),
        (rows, partial.columns, *x.stride(), *dy.stride()),
        NET=network,
        GRADIENTS=gradients,
        OFFSET=_offset_type(network, rows, x, dy),
    )
    return Summing.of(kernel, partial, whole, sums)


def dgrad(
    dy: Tensor,
    weights: tuple[Tensor, ...],
    kept: Tensor | None,
    own: Tensor | None,
    dz: Tensor | None,
    last: Tensor | None,
    dx: Tensor | None,
    network: Network,
    gradients: Gradients,
    tile: TileConfig,
) -> Launch | None:
    """The chain of dz from dy down to the lowest layer that a gradient is wanted of, and dx.

    Args:
        dy: (M, d_L), any strides.
        kept: as `forward` wrote it; own (M, d_L), contiguous: what is kept of the last layer, None without activation.
        dz: as kept, written; last (M, d_L), contiguous: the last layer's dz, written where own is given.
        dx: (M, d_0), contiguous, written; or None.
    """
    rows = dy.shape[0]
    return launch(
        network_dgrad_kernel,
        tile.started(cdiv(rows, tile.block_m)),
        dy.device,
        tile,
        (dy, dx, weights, kept, own, dz, last),
        (rows, *dy.stride()),
        NET=network,
        LOWEST=gradients.lowest,
        OFFSET=_offset_type(network, rows, dy),
    )


def wgrad(
    x: Tensor,
    dy: Tensor,
    kept: Tensor | None,
    dz: Tensor | None,
    sums: Sequence[Tensor],
    network: Network,
    gradients: Gradients,
    tile: TileConfig,
) -> Summing | None:
    """Every dW and db that `gradients` names.

    Args:
        x: (M, d_0), any strides; dy (M, d_L), any strides: the last layer's dz.
        kept, dz: as `forward` and `dgrad` wrote them.
        sums: as in `recompute`.
    """
    rows = x.shape[0]
    tiles = gradients.tile_starts[-1]
    most = max(1, tile.programs // tiles)
    chunk = cdiv(cdiv(rows, most), tile.block_k) * tile.block_k
    splits = cdiv(rows, chunk)
    partial = Partial(splits, gradients.starts[-1], 0, _accumulator(network))
    whole, *_ = partial.allocate(x.device)
    kernel = launch(
        network_wgrad_kernel,
        splits * tiles,
        x.device,
        tile,
        (x, dy, kept, dz, whole),
        (rows, chunk, partial.columns, *x.stride(), *dy.stride()),
        NET=network,
        GRADIENTS=gradients,
        OFFSET=_offset_type(network, rows, x, dy),
    )
    return Summing.of(kernel, partial, whole, sums)


@dataclass(frozen=True)
class Summing:
    """A launch that ends in partial sums, and the one that adds them."""

    kernel: Launch
    total: Launch | None  # None where no sum is wanted
    partial: Partial

    @classmethod
    def of(cls, kernel: Launch | None, partial: Partial, whole: Tensor, sums: Sequence[Tensor]) -> Summing | None:
        """Add what a kernel wrote to `whole`; returns both, for doing so again, if they can be."""
        total = sum_partials(whole, sums) if sums else None
        return None if kernel is None or (sums and total is None) else cls(kernel, total, partial)

    def __call__(self, *tensors: Any) -> bool:
        """With the kernel's tensors but for the partial sums, and the tuple of sums after them."""
        *of_kernel, sums = tensors
        whole, *_ = self.partial.allocate(of_kernel[0].device)
        return self.kernel(*of_kernel, whole) and (self.total is None or self.total(whole, sums))


def _accumulator(network: Network) -> torch.dtype:
    return torch.float64 if network.dtype == torch.float64 else torch.float32


def _offset_type(network: Network, rows: int, *strided: Tensor) -> Any:
    """The integer type for offsets: 64 bits where any element lies at 2^31 or beyond."""
    if rows * network.row_elements >= 2**31 or network.is_wide:
        return tl.int64
    scattered = [tensor for tensor in strided if not tensor.is_contiguous()]
    return offset_type(*scattered) if scattered else tl.int32
