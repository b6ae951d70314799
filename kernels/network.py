"""A narrow network in one kernel: H_l = a_l(H_{l-1} W_lᵀ + b_l) for every layer. Activations never leave the chip.

There are four kernels. This file has what they share.

forward      x -> y in one launch; in training it may save one tensor for each layer
one_pass     every dW and db, and dx, with the sums in registers. It takes one launch, or one for each group of layers.
             It reads the tensors that the forward saved, or recomputes them from x
dgrad        every dz, and dx, from the tensors that the forward saved
wgrad        every dW and db, from the saved tensors and dgrad's dz

one_pass and wgrad write sums over the rows of each program, in fp32 (fp64 networks: in fp64). `sum_partials` adds them
in a fixed order.

A program goes through tiles of rows. It loads the weights once, before the first tile. (A wide first layer is an
exception: its weight is streamed. wgrad reads no weights.) Widths are padded to the next power of two with zeros. The
padding of an activation is set to zero too, as a(0) need not be 0, nor even finite.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activation import Activation
from .dropout import factors, keep_scale, reads_output, redraws, saves_preactivation
from .language import tl, triton
from .launch import cdiv, offset_type
from .network_tiles import padded
from .tile import activate, differentiate, dot, relu_to, round_to, store

__all__ = ["Gradients", "Network", "make_gradients", "make_network"]

WGRAD_TILE = 128  # rows and columns of dW that one program sums, at most


@dataclass(frozen=True, eq=False)
class Network:
    """The compile-time description of a network. `make_network` returns the same object for the same network.

    Layer i maps width i to width i + 1.
    """

    widths: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]  # for each layer: strides of W's rows, of W's columns, and of b
    activations: tuple[Activation, ...]
    dtype: torch.dtype
    precision: str  # the way fp32 is multiplied: "ieee", "tf32", "bf16x6", "fp16x3" or "fp16x1" (see tile.py)
    drops: tuple[bool, ...]  # for each layer, True if it has Dropout. Its probability is an argument of the kernels
    rounds_with_relu: bool  # True if relu and the rounding to 16 bits are one instruction

    # Derived from the fields above, for the kernels to read.
    pads: tuple[int, ...] = field(init=False)  # widths padded to a power of two
    sides: tuple[int, ...] = field(init=False)  # for each width, the side of dW's tile
    # For each hidden layer, the total width of the hidden layers before it; and the total of all.
    starts: tuple[int, ...] = field(init=False)
    saves_z: tuple[bool, ...] = field(init=False)
    reads_output: tuple[bool, ...] = field(init=False)  # True if z is saved, but the derivative reads the output
    redraws: tuple[bool, ...] = field(init=False)  # True if the layer's gradient needs Dropout's mask
    merges: tuple[bool, ...] = field(init=False)  # True if the layer's activation is part of the rounding of its output
    forwards: tuple[Any, ...] = field(init=False)
    backwards: tuple[Any, ...] = field(init=False)
    forwards_and_slopes: tuple[Any, ...] = field(init=False)
    parameters: tuple[tuple[float, ...], ...] = field(init=False)
    # For each layer, the function that computes its input from the saved tensor; None: the input itself is saved.
    rebuilds: tuple[Any, ...] = field(init=False)
    rebuild_parameters: tuple[tuple[float, ...], ...] = field(init=False)
    activates_output: bool = field(init=False)
    differentiates_output: bool = field(init=False)  # False if dz of the last layer is dy
    # True if db is a product with ones on tensor cores, which is exact only for 16-bit dtypes.
    sums_by_dot: bool = field(init=False)
    compute: Any = field(init=False)
    accumulator: Any = field(init=False)
    cache_key: str = field(init=False)

    def __post_init__(self) -> None:
        pads = tuple(padded(width) for width in self.widths)
        saves_z = tuple(map(saves_preactivation, self.activations, self.drops))
        activates_output = self.activations[-1].name != "identity"
        derived = {
            "pads": pads,
            "sides": tuple(min(pad, WGRAD_TILE) for pad in pads),
            "starts": tuple(itertools.accumulate(self.widths[1:-1], initial=0)),
            "saves_z": saves_z,
            "reads_output": tuple(map(reads_output, self.activations, self.drops)),
            "redraws": tuple(map(redraws, self.activations, self.drops)),
            "merges": tuple(
                self.rounds_with_relu and activation.name == "relu" and not drops
                for activation, drops in zip(self.activations, self.drops)
            ),
            "forwards": tuple(activation.forward for activation in self.activations),
            "backwards": tuple(activation.backward for activation in self.activations),
            "forwards_and_slopes": tuple(activation.forward_and_slope for activation in self.activations),
            "parameters": tuple(activation.constants(self.dtype) for activation in self.activations),
            "rebuilds": (None, *(a.forward if saves else None for a, saves in zip(self.activations[:-1], saves_z))),
            "rebuild_parameters": ((), *(a.constants(self.dtype) for a in self.activations[:-1])),
            "activates_output": activates_output,
            "differentiates_output": activates_output or self.drops[-1],
            "sums_by_dot": self.dtype.itemsize == 2,
            "compute": getattr(tl, str(self.dtype).removeprefix("torch.")),
            "accumulator": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        # Triton finds a compiled kernel on disk by the text of its constants. A function is represented by its source.
        functions = (*derived["forwards"], *derived["backwards"], *derived["forwards_and_slopes"])
        sources = [getattr(function, "cache_key", "") for function in functions]
        values = [
            derived[name] for name in ("sides", "saves_z", "reads_output", "redraws", "parameters", "activates_output")
        ]
        given = (self.widths, self.strides, self.dtype, self.precision, self.drops, self.rounds_with_relu)
        key = (*given, values, sources)
        object.__setattr__(self, "cache_key", str(key))

    def __repr__(self) -> str:
        return self.cache_key

    @property
    def layers(self) -> int:
        return len(self.activations)

    @functools.cached_property
    def row_elements(self) -> int:
        """The number of elements in one row of the largest tensor."""
        return max(*self.widths, self.starts[-1])

    @functools.cached_property
    def has_large_strides(self) -> bool:
        """True if the strides of a parameter are so large that its offsets need 64 bits."""
        spans = (n * sn + k * sk for n, k, (sn, sk, _) in zip(self.widths[1:], self.widths, self.strides))
        return max(*spans, *(n * sb for n, (_, _, sb) in zip(self.widths[1:], self.strides))) >= 2**31


@functools.lru_cache(maxsize=1024)
def make_network(
    widths: tuple[int, ...],
    strides: tuple[tuple[int, int, int], ...],
    activations: tuple[Activation, ...],
    dtype: torch.dtype,
    precision: str,
    drops: tuple[bool, ...] = (),
    rounds_with_relu: bool = False,
) -> Network:
    """The `Network`; always the same object for the same arguments, so that kernels are found by its identity.

    `drops` has True for each layer with Dropout; by default, no layer has it.
    """
    drops = drops or (False,) * len(activations)
    return Network(widths, strides, activations, dtype, precision, drops, rounds_with_relu)


@dataclass(frozen=True)
class Gradients:
    """The gradients that a backward computes, and the offset of each in a program's row of partial sums."""

    weights: tuple[bool, ...]
    biases: tuple[bool, ...]
    lowest: int  # the lowest layer that needs a gradient
    weight_starts: tuple[int, ...]
    bias_starts: tuple[int, ...]
    starts: tuple[int, ...]  # the offsets of the wanted gradients, layer by layer, the weight first; and the end
    tile_starts: tuple[int, ...]  # the first program of each layer in `wgrad`, and the end


@functools.lru_cache(maxsize=1024)
def make_gradients(
    widths: tuple[int, ...], weights: tuple[bool, ...], biases: tuple[bool, ...], input: bool
) -> Gradients:
    """The `Gradients` of a network. `weights`, `biases` and `input` are True where a gradient is wanted."""
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
    """Load rows of NET.widths[AT] elements, and round them to NET's dtype.

    `offsets` and `mask` have one element for each row, (rows, 1); a mask of None loads every row.
    """
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
    """Store rows of NET.widths[AT] elements, whose columns are contiguous."""
    cols = tl.arange(0, NET.pads[AT])[None, :]
    if NET.pads[AT] > NET.widths[AT]:
        mask = mask & (cols < NET.widths[AT])
    store(ptr + offsets + cols, rows, mask)


@triton.jit
def clear_padding(rows, NET: tl.constexpr, AT: tl.constexpr):
    """`rows`, with zeros in the columns beyond NET.widths[AT]."""
    if NET.pads[AT] > NET.widths[AT]:
        rows = tl.where(tl.arange(0, NET.pads[AT])[None, :] < NET.widths[AT], rows, 0.0)
    return rows


@triton.jit
def load_weight(ptr, NET: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr):
    """The weight of a layer, (d_l, d_{l-1}), padded."""
    rows = tl.arange(0, NET.pads[LAYER + 1])[:, None]
    offsets = rows.to(OFFSET) * NET.strides[LAYER][0]
    mask = rows < NET.widths[LAYER + 1] if NET.pads[LAYER + 1] > NET.widths[LAYER + 1] else None
    return load_rows(ptr, offsets, mask, NET.strides[LAYER][1], NET, LAYER, OFFSET)


@triton.jit
def broadcast_bias(ptr, NET: tl.constexpr, LAYER: tl.constexpr, BLOCK_M: tl.constexpr, OFFSET: tl.constexpr):
    """The bias in every row, or zeros: the initial accumulator of z.

    The bias is read from cache in every use. Held over the loop, it would take more registers than it has elements.
    """
    z = tl.full([BLOCK_M, NET.pads[LAYER + 1]], 0.0, NET.accumulator)
    if ptr is not None:
        cols = tl.arange(0, NET.pads[LAYER + 1])
        ptrs = ptr + cols.to(OFFSET) * NET.strides[LAYER][2]
        if NET.pads[LAYER + 1] > NET.widths[LAYER + 1]:
            bias = tl.load(ptrs, mask=cols < NET.widths[LAYER + 1], other=0.0)
        else:
            bias = tl.load(ptrs)
        bias = bias.to(NET.accumulator)[None, :]
        # Adding to zeros takes instructions. But without it, 6 layers 128 wide with gelu spill 14 words.
        z = tl.broadcast_to(bias, z.shape) if NET.merges[LAYER] else z + bias
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
    """z = x Wᵀ + b of a wide first layer, which loads BLOCK_K columns of x and W at a time."""
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
def drop(h, seed_ptr, keeps, m, NET: tl.constexpr, LAYER: tl.constexpr):
    """The rows of h from row m on, after the layer's Dropout if it has one."""
    if NET.drops[LAYER]:
        h = h * factors(seed_ptr, keeps[LAYER], LAYER, m, 0, h.shape[0], h.shape[1])
    return h


@triton.jit
def drop_gradient(dh, seed_ptr, keeps, m, NET: tl.constexpr, LAYER: tl.constexpr):
    """The gradient of a(z). `dh` is the gradient of the layer's output, that is, of a(z) after Dropout.

    Layers without `redraws` need no mask: the derivative of a dropped element is 0 there, so its dh does not matter.
    """
    if NET.redraws[LAYER]:
        dh = drop(dh, seed_ptr, keeps, m, NET, LAYER)
    elif NET.drops[LAYER]:
        dh = dh * keep_scale(keeps[LAYER])
    return dh


@triton.jit
def layer(z, seed_ptr, keeps, m, NET: tl.constexpr, LAYER: tl.constexpr, MERGES: tl.constexpr = False):
    """(saved tensor, h) from z: h = a(z) after Dropout, and the saved tensor is h itself or z.

    The forward and a backward that recomputes it both call this function, so they compute the same numbers. With
    MERGES, the activation is relu, and part of the rounding.
    """
    FORWARD: tl.constexpr = NET.forwards[LAYER]
    PARAMETERS: tl.constexpr = NET.parameters[LAYER]
    if NET.saves_z[LAYER]:
        kept = round_to(z, NET.compute)
        h = drop(activate(kept.to(z.dtype), FORWARD, PARAMETERS), seed_ptr, keeps, m, NET, LAYER)
        return kept, round_to(clear_padding(h, NET, LAYER + 1), NET.compute)
    elif MERGES:
        h = clear_padding(relu_to(z, NET.compute), NET, LAYER + 1)
        return h, h
    else:
        h = drop(activate(z, FORWARD, PARAMETERS), seed_ptr, keeps, m, NET, LAYER)
        h = round_to(clear_padding(h, NET, LAYER + 1), NET.compute)
        return h, h


@triton.jit
def differentiate_layer(dh, saved, NET: tl.constexpr, LAYER: tl.constexpr):
    """dh ⊙ a'(z), from the saved tensor."""
    FORWARD: tl.constexpr = NET.forwards[LAYER]
    BACKWARD: tl.constexpr = NET.backwards[LAYER]
    PARAMETERS: tl.constexpr = NET.parameters[LAYER]
    if NET.reads_output[LAYER]:
        saved = round_to(activate(saved, FORWARD, PARAMETERS), NET.compute).to(NET.accumulator)
    return differentiate(dh, saved, BACKWARD, PARAMETERS)


@triton.jit
def activation_backward(dh, kept, seed_ptr, keeps, m, NET: tl.constexpr, LAYER: tl.constexpr):
    """dz = dh ⊙ a'(z), from the saved tensor `kept`, with the mask of the layer's Dropout."""
    dh = drop_gradient(dh.to(NET.accumulator), seed_ptr, keeps, m, NET, LAYER)
    dz = differentiate_layer(dh, kept.to(NET.accumulator), NET, LAYER)
    return round_to(clear_padding(dz, NET, LAYER + 1), NET.compute)


@triton.jit
def multiply_back(dz, w, NET: tl.constexpr, LAYER: tl.constexpr, BLOCK_M: tl.constexpr):
    """dz W: dh of the layer below."""
    return matmul(dz, w, tl.full([BLOCK_M, NET.pads[LAYER]], 0.0, NET.accumulator), NET)


def dropout_arguments(
    tensors: tuple[Any, ...], seed: Tensor | None, keeps: tuple[float | None, ...] | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(tensors, scalars) of a launch, for a kernel that takes `seed_ptr` and `keeps` after its other tensors.

    The seed comes after `tensors`, and `keeps` before the kernel's scalars. Without Dropout both are None, which Triton
    compiles in as constants: the kernel has no code for Dropout. `keeps` are arguments, not constants, so that another
    probability compiles nothing.
    """
    assert (seed is None) == (keeps is None)
    return (tensors, (None, None)) if seed is None else ((*tensors, seed), (keeps,))


def partial_dtype(network: Network) -> torch.dtype:
    return torch.float64 if network.dtype == torch.float64 else torch.float32


def network_offset_type(network: Network, rows: int, *strided: Tensor) -> Any:
    """The integer type for offsets: 64 bits if any element has an offset of 2^31 or more."""
    if rows * network.row_elements >= 2**31 or network.has_large_strides:
        return tl.int64
    scattered = [tensor for tensor in strided if not tensor.is_contiguous()]
    return offset_type(*scattered) if scattered else tl.int32
