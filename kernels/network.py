"""A narrow network in one kernel: H_l = a_l(H_{l-1} W_lᵀ + b_l) for every layer, activations never leaving the chip.

forward      x -> y in one launch; in training it may keep one tensor of each hidden layer
one_pass     dz down the layers with dx at its end, and every dW and db in registers; from the tensors that the forward
             kept, or from x alone: the forward again
dgrad        dz down the layers and dx from the tensors that the forward kept
wgrad        every dW and db from the kept tensors and dgrad's dz

one_pass and wgrad leave fp32 sums of each program's rows, which `sum_partials` adds in a fixed order.

A program loads the weights once and goes through tiles of rows. Widths are filled up to the next power of two: weights
with zeros, activations with zeros too, as a(0) need not be 0, nor finite.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activation import Activation
from .language import tl, triton
from .launch import cdiv, offset_type
from .network_tiles import padded
from .tile import activate, differentiate, dot, round_to, store

__all__ = ["Gradients", "Network", "gradients_of", "network_of"]

WGRAD_TILE = 128  # rows and columns of dW that one program sums, at most


@dataclass(frozen=True, eq=False)
class Network:
    """A network as its kernels are compiled for it: one object a network, made by `network_of`.

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
    forwards_and_slopes: tuple[Any, ...] = field(init=False)
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
            "forwards_and_slopes": tuple(activation.forward_and_slope for activation in self.activations),
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
        functions = (*derived["forwards"], *derived["backwards"], *derived["forwards_and_slopes"])
        sources = [getattr(function, "cache_key", "") for function in functions]
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
        """True if a parameter is so spread out in memory that offsets into it need 64 bits."""
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
    """The gradients that a backward computes, and where the partial sums of each begin in a program's."""

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


def partial_dtype(network: Network) -> torch.dtype:
    return torch.float64 if network.dtype == torch.float64 else torch.float32


def network_offset_type(network: Network, rows: int, *strided: Tensor) -> Any:
    """The integer type for offsets: 64 bits where any element lies at 2^31 or beyond."""
    if rows * network.row_elements >= 2**31 or network.is_wide:
        return tl.int64
    scattered = [tensor for tensor in strided if not tensor.is_contiguous()]
    return offset_type(*scattered) if scattered else tl.int32
