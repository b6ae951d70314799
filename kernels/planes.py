"""fp32 operands split into two fp16 planes, once, before the products: PRECISION "fp16x3" of the layer kernels.

x 2^e = high + 2^-11 low                                                              split
a b = 2^-(e_a + e_b) (high_a high_b + 2^-11 (low_a high_b + high_a low_b))            multiply_planes

With PRECISION "fp16x1" there is no low plane: high has the ten bits of mantissa that tf32 has.

Both planes are fp16. The tensor is divided into blocks of 128 x 128, in which elements share an exponent e. It brings
the largest of them to between 2^14 and 2^15. There are three choices of the elements that share one:

- "blocks": all elements of a block. For x, h and W. A product may sum along the rows or the columns of such planes.
- "rows": the elements of one row of a block. For dz in dgrad, which sums along its rows.
- "columns": the elements of one column of a block. For dz in wgrad, which sums along its columns.

dz is the first factor of both its products, so 2^-(e_a + e_b) is one number for each row of an output tile and each
block of the reduction. Where both factors have exponents of blocks, it is one number for the whole tile.

The sum over blocks of the reduction stays outside the tensor cores, which would round it toward zero. The product of
the low planes is left out. It is at most 2^-22 |a||b|.

Error. The planes hold an element to within 2^-23 of itself or 2^-50 of the largest element with the same exponent,
whichever is more; the first is more for elements above 2^-27 of the largest. (If the largest element is so small that e
is at its upper limit, the second is 2^-36 / 2^e.) So the error of an output is at most 2^-21 |a||b| plus the rounding
of sums. For small elements of b, the bound is 2^-50 |a| times the largest |b| with the same exponent; for those of
a likewise. The high plane alone holds an element to within 2^-11 of itself, as tf32 does, or 2^-39 of that largest
element.

A sum of small elements alone would lose its bits. That and other limits of the planes are flagged: `split` sets a
block's flags

- if an element is not finite or at least 2^78;
- with "blocks", for products that sum along the block's rows, if the largest element of any row, times 2^e, is smaller
  than 2^-9 (rows of zeros do not count). It is then smaller than 2^-23 of the block's largest element or, with e at its
  upper limit, smaller than 2^-52. For products that sum along the block's columns, if this holds for any column;
- with "rows" and "columns", if this holds for any row, or for any column. It is then smaller than 2^-81: a row with an
  exponent of its own is never small beside another.

Exponents have a lower and an upper limit, so that 2^-(e_a + e_b) and 2^-11 of it are always normal numbers. The upper
limit is larger for dz, because a classifier that is sure of a row has a tiny gradient there.

A second launch of the same layer kernel, with PRECISION "redo", recomputes the output tiles that meet a flagged
block, from the fp32 operands on FMA units. It has at most one program for each multiprocessor. Each program first reads
all flags of both operands, four bytes a block, and returns if none is set.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .language import tl, triton
from .launch import Launch, cdiv, launch, offset_type
from .tile import dot, power_of_two, split_scaled
from .tile_config import TileConfig

__all__ = [
    "PLANES", "SIDE", "SPLIT", "Exponents", "Operand", "has_flags", "info_shape", "matrix", "meets_flags",
    "multiply_planes", "plane_operand", "planes_shape", "redo_tile", "split",
]  # fmt: skip

Exponents = Literal["blocks", "rows", "columns"]  # the elements of a block that share an exponent

# Device functions take these two as defaults of arguments. As global constants they would make Triton's cache keys
# depend on the order of compilations: if a kernel calls a function at one place only, the kernel's key has the
# function's constants only if the function was compiled before.
SIDE = 128  # of a block
LOW = 11  # the low plane is scaled by 2^LOW

SPLIT = TileConfig(SIDE, SIDE, num_warps=8)
TOP = tl.constexpr(14)  # the largest element with an exponent lies between 2^TOP and 2 * 2^TOP
# The lower limit of all exponents, the upper limit of exponents of blocks, and that of exponents of rows and columns.
# With them, 2^-(e_a + e_b) and 2^-11 of it are normal fp32 numbers.
LEAST, MOST_OF_BLOCKS, MOST_OF_ROWS = tl.constexpr(-63), tl.constexpr(43), tl.constexpr(72)
SMALLEST = tl.constexpr(2.0**-9)  # a row whose largest scaled element is smaller is flagged
ROWS_FLAGGED, COLUMNS_FLAGGED = tl.constexpr(1), tl.constexpr(2)  # bits of a block's flags


@triton.jit
def is_any(condition):
    """1 if the condition holds anywhere in a matrix; else 0."""
    return tl.max(tl.max(condition.to(tl.int32), axis=1), axis=0)


@triton.jit
def is_small(most, scale):
    """True for each row or column that loses bits. `most` is that row's or column's largest fp32 element, as bits."""
    return (most > 0) & (most.to(tl.float32, bitcast=True) * scale < SMALLEST)


@triton.jit(do_not_specialize=["M"])
def split_kernel(
    x_ptr,  # (M, N)
    planes_ptr,  # (PLANES, M, N): high, low; each plane M rows of `stride_row` elements
    info_ptr,  # as `info_shape` describes
    sums_ptr,  # (blocks of rows, N), contiguous: the sum of each block over its rows; or None
    M,
    N,
    stride_m,
    stride_n,
    stride_row,
    PLANES: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr = LOW,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m = tl.program_id(0) // blocks_n
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows.to(OFFSET)[:, None] * stride_m + cols.to(OFFSET)[None, :] * stride_n
    value = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    # Bits of absolute values, compared as integers, have the order of the values. NaN is larger than all numbers.
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    of_rows, of_columns = tl.max(size, axis=1, keep_dims=True), tl.max(size, axis=0, keep_dims=True)
    if EXPONENTS == "blocks":
        most = tl.max(of_rows, axis=0, keep_dims=True)
    elif EXPONENTS == "rows":
        most = of_rows
    else:
        most = of_columns
    MOST: tl.constexpr = MOST_OF_BLOCKS if EXPONENTS == "blocks" else MOST_OF_ROWS
    exponent = tl.minimum(tl.maximum(-(most >> 23) + (127 + TOP), LEAST), MOST)
    scale = power_of_two(exponent)
    if EXPONENTS == "blocks":
        flags = is_any(is_small(of_rows, scale)) * ROWS_FLAGGED
        flags |= is_any(is_small(of_columns, scale)) * COLUMNS_FLAGGED
    else:  # one product reads these planes
        flags = is_any(is_small(most, scale)) * (ROWS_FLAGGED | COLUMNS_FLAGGED)
    flags |= is_any((most >> 23) - 127 > TOP - LEAST) * (ROWS_FLAGGED | COLUMNS_FLAGGED)
    high, low = split_scaled(value * scale, 2.0**LOW)
    places = rows.to(OFFSET)[:, None] * stride_row + cols[None, :]
    tl.store(planes_ptr + places, high, mask=mask)
    if PLANES == 2:
        tl.store(planes_ptr + M.to(tl.int64) * stride_row + places, low, mask=mask)
    tl.store(info_ptr + tl.program_id(0), flags)
    COUNT: tl.constexpr = most.shape[0] * most.shape[1]
    numbers = tl.num_programs(0) + tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(info_ptr + numbers, tl.reshape(exponent, (COUNT,)))
    if sums_ptr is not None:
        # Sums of sums err less than one long sum. A thread holds every eighth row, so the first two sums need no other
        # thread.
        few = tl.sum(tl.sum(tl.reshape(value, (BLOCK_M // 32, 4, 8, BLOCK_N)), axis=0), axis=0)
        tl.store(sums_ptr + block_m.to(OFFSET) * N + cols, tl.sum(few, axis=0), mask=cols < N)


def planes_shape(rows: int, width: int, count: int = 2) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shape and strides of `count` planes of a (rows, width) tensor. Each row is 16-byte aligned."""
    stride = cdiv(width, 8) * 8
    return (count, rows, width), (rows * stride, stride, 1)


def info_shape(rows: int, width: int, exponents: Exponents = "blocks") -> tuple[int, int, int]:
    """The shape of the int32 tensor with the flags and exponents of a (rows, width) tensor's blocks.

    Its memory holds the flags of all blocks, and then the exponents of the first block, of the second one, and so on.
    """
    return 1 + (1 if exponents == "blocks" else SIDE), cdiv(rows, SIDE), cdiv(width, SIDE)


def split(
    x: Tensor, planes: Tensor, info: Tensor, sums: Tensor | None = None, exponents: Exponents = "blocks"
) -> Launch | None:
    """Launch the split of x into two planes or one, and the sums of its rows if `sums` is given.

    Args:
        x: (M, N), fp32, any strides.
        planes: fp16, written, of the shape and strides of `planes_shape`.
        info: int32, contiguous, written, of the shape of `info_shape`.
        sums: (blocks of rows, N), fp32, contiguous, written: partial sums over rows, for `sum_partials`; or None.
    """
    M, N = x.shape
    assert x.dtype == torch.float32
    assert (planes.shape, planes.stride()) == planes_shape(M, N, planes.shape[0])
    assert info.shape == info_shape(M, N, exponents)
    assert info.is_contiguous()
    assert sums is None or (sums.shape == (info.shape[1], N) and sums.is_contiguous())
    return launch(
        split_kernel,
        info[0].numel(),
        x.device,
        SPLIT,
        (x, planes, info, sums),
        (M, N, *x.stride(), planes.stride(1)),
        PLANES=planes.shape[0],
        EXPONENTS=exponents,
        OFFSET=offset_type(x, planes[0]),
    )


PLANES = {"fp16x3": 2, "fp16x1": 1}  # the planes of an operand, by the tile's precision
Operand = Tensor | tuple[Tensor, Tensor]


def redo_tile(tile: TileConfig) -> TileConfig:
    """The tile of the "redo" launch that follows a product with `tile`. It splits the reduction in the same way."""
    block_k, stages = (16, 3) if tile.split == 1 else (tile.block_k, 1)
    return TileConfig(
        *(128, 64, block_k, tile.group_m, 8, stages), split=tile.split, programs=tile.programs, precision="redo"
    )


def matrix(operand: Operand) -> Tensor:
    """The matrix with the shape and strides of a product's operand.

    An operand is the matrix itself, or a tuple: (planes, info), whose matrix is the high plane; with PRECISION "redo"
    (fp32 tensor, info), whose matrix is that tensor.
    """
    if isinstance(operand, Tensor):
        return operand
    return operand[0] if operand[0].dim() == 2 else operand[0][0]


@triton.jit
def plane_operand(
    operand, size, length, stride_row, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BY_K: tl.constexpr,
    SIDE: tl.constexpr = SIDE,
):  # fmt: skip
    """(descriptor of the high plane, of the low plane, pointer to the exponents) of an operand, like `tile.operand`.

    BY_K is True if the reduction runs along its rows, False if it runs along its columns. Without a low plane, its
    descriptor must not be used.
    """
    high_ptr = operand[0]
    exponents_ptr = operand[1] + tl.cdiv(size, SIDE) * tl.cdiv(length, SIDE)
    if BY_K:
        low_ptr = high_ptr + size.to(tl.int64) * stride_row
        high = tl.make_tensor_descriptor(high_ptr, [size, length], [stride_row, 1], [BLOCK, BLOCK_K])
        low = tl.make_tensor_descriptor(low_ptr, [size, length], [stride_row, 1], [BLOCK, BLOCK_K])
    else:
        low_ptr = high_ptr + length.to(tl.int64) * stride_row
        high = tl.make_tensor_descriptor(high_ptr, [length, size], [stride_row, 1], [BLOCK_K, BLOCK])
        low = tl.make_tensor_descriptor(low_ptr, [length, size], [stride_row, 1], [BLOCK_K, BLOCK])
    return high, low, exponents_ptr


@triton.jit
def block_place(at, k, size, length, BY_K: tl.constexpr, SIDE: tl.constexpr = SIDE):
    """The number of an operand's block at row `at` of the product and index k of the reduction."""
    if BY_K:
        return (at // SIDE) * tl.cdiv(length, SIDE) + k // SIDE
    else:
        return (k // SIDE) * tl.cdiv(size, SIDE) + at // SIDE


@triton.jit
def load_exponents(
    exponents_ptr, at, k, size, length, BLOCK: tl.constexpr, BY_K: tl.constexpr, BY_ROW: tl.constexpr,
    SIDE: tl.constexpr = SIDE,
):  # fmt: skip
    """The exponent of an operand's block; with BY_ROW, those of BLOCK rows of the product from `at` on, (BLOCK, 1)."""
    block = block_place(at, k, size, length, BY_K)
    if BY_ROW:
        return tl.load(exponents_ptr + block * SIDE + at % SIDE + tl.arange(0, BLOCK))[:, None]
    else:
        return tl.load(exponents_ptr + block)


@triton.jit
def multiply_planes(
    a,  # a `plane_operand` of M rows
    b,  # a `plane_operand` of N rows
    m,  # first row of a; a tile lies within one block of 128
    n,  # first row of b
    M,
    N,
    K,  # the length of the reduction
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_BY_K: tl.constexpr,
    B_BY_K: tl.constexpr,
    BY_ROW: tl.constexpr,  # True if each row of the product has exponents of its own in a; False: a block of a has one
    PRECISION: tl.constexpr,  # "fp16x3", or "fp16x1" for high planes alone
    LOW: tl.constexpr = LOW,
):
    """Σ_k a[m, k] b[n, k] over begin <= k < end, (BLOCK_M, BLOCK_N). `begin` is a multiple of BLOCK_K.

    `end` must be the end of the operands, or whole blocks after `begin`, as in `tile.multiply`.
    """
    a_high, a_low, a_exponents = a
    b_high, b_low, b_exponents = b
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Exponents are loaded a block ahead. A product would wait for those of its own block.
    a_exponent = load_exponents(a_exponents, m, begin, M, K, BLOCK_M, A_BY_K, BY_ROW)
    b_exponent = load_exponents(b_exponents, n, begin, N, K, BLOCK_N, B_BY_K, False)
    for k in range(begin, end, BLOCK_K):
        exponent = a_exponent + b_exponent
        after = tl.minimum(k + BLOCK_K, end - 1)
        a_exponent = load_exponents(a_exponents, m, after, M, K, BLOCK_M, A_BY_K, BY_ROW)
        b_exponent = load_exponents(b_exponents, n, after, N, K, BLOCK_N, B_BY_K, False)
        high_a = a_high.load([m, k]) if A_BY_K else tl.trans(a_high.load([k, m]))
        high_b = tl.trans(b_high.load([n, k])) if B_BY_K else b_high.load([k, n])
        if PRECISION == "fp16x3":
            low_a = a_low.load([m, k]) if A_BY_K else tl.trans(a_low.load([k, m]))
            low_b = tl.trans(b_low.load([n, k])) if B_BY_K else b_low.load([k, n])
        high = dot(high_a, high_b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
        acc = tl.fma(high, power_of_two(-exponent), acc)  # on other units, while the next products are computed
        if PRECISION == "fp16x3":
            low = dot(low_a, high_b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
            low = dot(high_a, low_b, low, "ieee")
            acc = tl.fma(low, power_of_two(-exponent - LOW), acc)
    return acc


@triton.jit
def has_flags(info_ptr, rows, width, BY_K: tl.constexpr, SIDE: tl.constexpr = SIDE):
    """True if any block of a (rows, width) operand is flagged for products with this BY_K of `plane_operand`."""
    blocks = tl.cdiv(rows, SIDE) * tl.cdiv(width, SIDE)
    flags = tl.zeros((1024,), tl.int32)
    for first in range(0, blocks, 1024):
        block = first + tl.arange(0, 1024)
        flags |= tl.load(info_ptr + block, mask=block < blocks, other=0)
    return tl.max(flags & (ROWS_FLAGGED if BY_K else COLUMNS_FLAGGED), axis=0) > 0


@triton.jit
def is_flagged(info_ptr, at, begin, end, size, length, BY_K: tl.constexpr, SIDE: tl.constexpr = SIDE):
    """True if a product of the rows from `at` (within one block) over begin <= k < end meets a flagged block."""
    found = tl.zeros((32,), tl.int32)  # in every warp, so that no warp waits for another
    for first in range(begin // SIDE, tl.cdiv(end, SIDE), 32):
        block = first + tl.arange(0, 32)
        places = block_place(at, block * SIDE, size, length, BY_K)
        found |= tl.load(info_ptr + places, mask=block < tl.cdiv(end, SIDE), other=0)
    return tl.max(found & (ROWS_FLAGGED if BY_K else COLUMNS_FLAGGED), axis=0) > 0


@triton.jit
def meets_flags(
    a_info, b_info, m, n, begin, end, M, N, K, A_BY_K: tl.constexpr, B_BY_K: tl.constexpr,
):  # fmt: skip
    """True if the output tile at (m, n) of a product over begin <= k < end meets a flagged block of either operand."""
    return is_flagged(a_info, m, begin, end, M, K, A_BY_K) | is_flagged(b_info, n, begin, end, N, K, B_BY_K)
