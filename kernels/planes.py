"""fp32 operands split into two fp16 planes, once, before their products: PRECISION "fp16x3" of plane_products.py.

x 2^e = high + 2^-11 low                                                              split, store_planes
a b = 2^-(e_a + e_b) (high_a high_b + 2^-11 (low_a high_b + high_a low_b))            multiply_planes

With PRECISION "fp16x1" there is no low plane: high has the ten bits of mantissa that tf32 has.

Both planes are fp16. The tensor is divided into blocks of 128 x 128, in which elements share an exponent e. It brings
the largest of them to between 2^14 and 2^15. A `Form` says for which product a tensor is split, and which elements
share an exponent:

- along "rows" or "columns": the product sums along the rows of the tensor, or along its columns. The forward sums along
  the rows of x and W, dgrad along the rows of dz and the columns of W, wgrad along the columns of dz and h.
- own False: all elements of a block share one exponent. For x, h and W.
- own True: the elements of a block's row share one exponent, or those of a block's column. For dz.

dz is the first factor of both its products, so 2^-(e_a + e_b) is one number for each row of an output tile and each
block of the reduction. Where both factors have one exponent a block, it is one number for the whole tile.

The sum over blocks of the reduction stays outside the tensor cores, which would round it toward zero. The product of
the low planes is left out. It is at most 2^-22 |a||b|.

Error. The planes hold an element to within 2^-23 of itself, or to within 2^-50 of the largest element with the same
exponent, whichever is more. The first bound is for elements above 2^-27 of the largest, the second for smaller ones.
(If the largest element is so small that e is at its upper limit, the second bound is 2^-36 / 2^e.) So the error of an
output is at most 2^-21 |a||b|, plus the rounding of sums. Where elements of b are small, the bound is 2^-50 |a| times
the largest |b| with the same exponent. Where elements of a are small, it is 2^-50 |b| times the largest such |a|. The
high plane alone holds an element to within 2^-11 of itself, as tf32 does, or 2^-39 of the largest one.

A product that sums small elements only would lose accuracy. The blocks with such elements are flagged, and those that
go beyond other limits of the planes. In a tensor that is split along its rows, a block is flagged

- if an element is not finite or is at least 2^78;
- if a row is too small: its largest element, times 2^e, is below 2^-9. (Rows of zeros do not count.) Where the block
  has one exponent, this element is below 2^-23 of the block's largest, or below 2^-52 if e is at its upper limit. Where
  each row has an exponent, e is then at its upper limit, and this element is below 2^-81.

The same holds for the columns of a tensor that is split along its columns.

Exponents have a lower and an upper limit, so that 2^-(e_a + e_b) and 2^-11 of it are always normal numbers. The upper
limit is larger for dz, because a classifier that is sure of a row has a tiny gradient there.

A second launch of the same kernel, with PRECISION "redo", recomputes the output tiles that meet a flagged block, in
fp32 on FMA units. It has at most one program for each multiprocessor. Each program first reads all flags of both
operands, four bytes a block, and returns if none is set. It reads the fp32 operands. Of an operand that a product has
split, it reads the planes, because there may be no fp32 copy. The two planes of a flagged block hold the upper and the
lower halves of its fp32 numbers. Those of other blocks hold a number to within the error above: one below 2^-51 of the
largest with the same exponent is 0, and an infinity times it is NaN.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .language import tl, triton
from .launch import Launch, cdiv, launch, offset_type
from .tile import dot, power_of_two, split_scaled
from .tile_config import TileConfig

__all__ = [
    "PLANES", "SIDE", "SPLIT", "Form", "Operand", "has_flags", "info_shape", "matrix", "meets_flags",
    "multiply_operands", "plane_operand", "plane_targets", "planes_shape", "redo_tile", "split",
    "store_planes",
]  # fmt: skip


class Form(NamedTuple):
    """The form in which a tensor is split, for one product.

    Attributes:
        along: "rows" if the product sums along the tensor's rows, "columns" if it sums along its columns.
        own: True if each row (or column) of a block has an exponent of its own, False if the block has one.
    """

    along: Literal["rows", "columns"]
    own: bool = False


# Device functions take these two as defaults of arguments. As global constants they would make Triton's cache keys
# depend on the order in which functions are compiled: where a kernel calls a function once, the function's constants
# are in the kernel's key if the function was compiled before the kernel, and are missing otherwise.
SIDE = 128  # of a block
LOW = 11  # the low plane is scaled by 2^LOW

SPLIT = TileConfig(SIDE, SIDE, num_warps=8)
TOP = tl.constexpr(14)  # the largest element with an exponent lies between 2^TOP and 2 * 2^TOP
# The lower limit of all exponents, the upper limit of exponents of blocks, and that of exponents of rows and columns.
# With them, 2^-(e_a + e_b) and 2^-11 of it are normal fp32 numbers.
LEAST, MOST_OF_BLOCKS, MOST_OF_ROWS = tl.constexpr(-63), tl.constexpr(43), tl.constexpr(72)
SMALLEST = tl.constexpr(2.0**-9)  # if the largest scaled element of a row is smaller, its block is flagged


@triton.jit
def largest_magnitudes(parts, ALONG: tl.constexpr):
    """The bits of the largest |element| of each row or column of a block.

    For rows, the result is a tuple of one vector. For columns, it has a vector for each part. Bits of absolute values,
    compared as integers, have the order of the values. NaN is larger than all numbers.
    """
    AXIS: tl.constexpr = 1 if ALONG == "rows" else 0
    largest = ()
    for i in tl.static_range(len(parts)):
        magnitudes = tl.max(parts[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)
        if ALONG == "columns" or i == 0:
            largest += (magnitudes,)
        else:
            largest = (tl.maximum(largest[0], magnitudes),)
    return largest


@triton.jit
def choose_exponents(largest, OWN: tl.constexpr):
    """(exponents, flag) of a block. The flag is 1 or 0.

    There is one entry of exponents for each vector in `largest`: a vector of the same shape with OWN, else the one
    exponent of the block.
    """
    MOST: tl.constexpr = MOST_OF_ROWS if OWN else MOST_OF_BLOCKS
    whole = tl.max(largest[0], axis=0)
    for i in tl.static_range(1, len(largest)):
        whole = tl.maximum(whole, tl.max(largest[i], axis=0))
    exponents, flag = (), ((whole >> 23) - 127 > TOP - LEAST).to(tl.int32)
    for i in tl.static_range(len(largest)):
        magnitude = largest[i] if OWN else whole
        exponents += (tl.minimum(tl.maximum(-(magnitude >> 23) + (127 + TOP), LEAST), MOST),)
        scaled = largest[i].to(tl.float32, bitcast=True) * power_of_two(exponents[i])
        flag |= tl.max(((largest[i] > 0) & (scaled < SMALLEST)).to(tl.int32), axis=0)
    return exponents, flag


@triton.jit
def plane_targets(
    planes_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(high, low): descriptors, or pointers, to store tiles of the planes of an (M, N) tensor."""
    stride = (N + 7) // 8 * 8
    low_ptr = planes_ptr + M.to(tl.int64) * stride if PLANES == 2 else planes_ptr
    if DESCRIPTORS:
        high = tl.make_tensor_descriptor(planes_ptr, [M, N], [stride, 1], [BLOCK_M, BLOCK_N])
        low = tl.make_tensor_descriptor(low_ptr, [M, N], [stride, 1], [BLOCK_M, BLOCK_N])
        return high, low
    else:
        return planes_ptr, low_ptr


@triton.jit
def store_planes(
    parts,  # the block's columns, in equal parts; zeros beyond the tensor
    targets,  # `plane_targets` for tiles of a part's shape
    info_ptr,  # as `info_shape` describes
    m,  # first row of the block
    n,  # first column
    M,
    N,
    ALONG: tl.constexpr,
    OWN: tl.constexpr,
    PLANES: tl.constexpr,
    OFFSET: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LOW: tl.constexpr = LOW,
    SIDE: tl.constexpr = SIDE,
):
    """Split a block of a tensor, and store its planes, its exponents and its flag.

    If the block is flagged and has two planes, these hold the upper and the lower halves of its fp32 numbers instead.
    """
    BLOCK_N: tl.constexpr = parts[0].shape[1]
    largest = largest_magnitudes(parts, ALONG)
    exponents, flag = choose_exponents(largest, OWN)
    rows = m + tl.arange(0, SIDE)
    for i in tl.static_range(len(parts)):
        scale = power_of_two(exponents[i if ALONG == "columns" else 0])
        if OWN:
            scale = tl.expand_dims(scale, 1 if ALONG == "rows" else 0)
        high, low = split_scaled(parts[i] * scale, 2.0**LOW)
        if PLANES == 2:
            bits = parts[i].to(tl.int32, bitcast=True)
            high = tl.where(flag > 0, (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True), high)
            low = tl.where(flag > 0, bits.to(tl.int16).to(tl.float16, bitcast=True), low)
        first = n + i * BLOCK_N
        if DESCRIPTORS:
            targets[0].store([m, first], high)
            if PLANES == 2:
                targets[1].store([m, first], low)
        else:
            cols = first + tl.arange(0, BLOCK_N)
            offsets = rows.to(OFFSET)[:, None] * ((N + 7) // 8 * 8) + cols[None, :]
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            tl.store(targets[0] + offsets, high, mask=mask)
            if PLANES == 2:
                tl.store(targets[1] + offsets, low, mask=mask)
    blocks_n = tl.cdiv(N, SIDE)
    block = m // SIDE * blocks_n + n // SIDE
    tl.store(info_ptr + block, flag)
    exponents_ptr = info_ptr + tl.cdiv(M, SIDE) * blocks_n + block * (SIDE if OWN else 1)
    if OWN:
        COUNT: tl.constexpr = SIDE if ALONG == "rows" else BLOCK_N
        for i in tl.static_range(len(exponents)):
            tl.store(exponents_ptr + i * COUNT + tl.arange(0, COUNT), exponents[i])
    else:
        tl.store(exponents_ptr, exponents[0])


@triton.jit(do_not_specialize=["M"])
def split_kernel(
    x_ptr,  # (M, N)
    planes_ptr,  # (PLANES, M, N): high, low; each plane M rows, padded to a multiple of 8 elements
    info_ptr,  # as `info_shape` describes
    sums_ptr,  # (blocks of rows, N), contiguous: the sum of each block over its rows; or None
    M,
    N,
    stride_m,
    stride_n,
    ALONG: tl.constexpr,
    OWN: tl.constexpr,
    PLANES: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m = tl.program_id(0) // blocks_n
    m, n = block_m * BLOCK_M, tl.program_id(0) % blocks_n * BLOCK_N
    rows, cols = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows.to(OFFSET)[:, None] * stride_m + cols.to(OFFSET)[None, :] * stride_n
    value = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    targets = plane_targets(planes_ptr, M, N, BLOCK_M, BLOCK_N, PLANES, False)
    store_planes((value,), targets, info_ptr, m, n, M, N, ALONG, OWN, PLANES, OFFSET, False)
    if sums_ptr is not None:
        # Sums of sums err less than one long sum. A thread holds every eighth row, so the first two sums need no other
        # thread.
        few = tl.sum(tl.sum(tl.reshape(value, (BLOCK_M // 32, 4, 8, BLOCK_N)), axis=0), axis=0)
        tl.store(sums_ptr + block_m.to(OFFSET) * N + cols, tl.sum(few, axis=0), mask=cols < N)


def planes_shape(rows: int, width: int, count: int = 2) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shape and strides of `count` planes of a (rows, width) tensor. Each row is 16-byte aligned."""
    stride = cdiv(width, 8) * 8
    return (count, rows, width), (rows * stride, stride, 1)


def info_shape(rows: int, width: int, form: Form) -> tuple[int, int, int]:
    """The shape of the int32 tensor with the flags and exponents of a (rows, width) tensor's blocks.

    Its memory holds the flags of all blocks, and then the exponents of the first block, of the second one, and so on.
    """
    return 1 + (SIDE if form.own else 1), cdiv(rows, SIDE), cdiv(width, SIDE)


def split(x: Tensor, planes: Tensor, info: Tensor, sums: Tensor | None, form: Form) -> Launch | None:
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
    assert info.shape == info_shape(M, N, form)
    assert info.is_contiguous()
    assert sums is None or (sums.shape == (info.shape[1], N) and sums.is_contiguous())
    return launch(
        split_kernel,
        info[0].numel(),
        x.device,
        SPLIT,
        (x, planes, info, sums),
        (M, N, *x.stride()),
        ALONG=form.along,
        OWN=form.own,
        PLANES=planes.shape[0],
        OFFSET=offset_type(x, planes[0]),
    )


PLANES = {"fp16x3": 2, "fp16x1": 1}  # the planes of an operand, by the tile's precision
# The factor of a product: (planes, info) of a tensor; or (fp32 tensor, info), for "redo".
Operand = tuple[Tensor, Tensor]


def redo_tile(tile: TileConfig) -> TileConfig:
    """The tile of the "redo" launch that follows a product with `tile`. It splits the reduction in the same way."""
    block_k, stages = (16, 3) if tile.split == 1 else (tile.block_k, 1)
    return TileConfig(
        *(SIDE, SIDE, block_k, tile.group_m, 8, stages), split=tile.split, programs=tile.programs, precision="redo"
    )


def matrix(operand: Operand) -> Tensor:
    """The matrix with the shape and strides of an operand: the high plane, or the fp32 tensor."""
    return operand[0] if operand[0].dim() == 2 else operand[0][0]


@triton.jit
def plane_operand(
    operand, size, length, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BY_K: tl.constexpr,
    PRECISION: tl.constexpr, SIDE: tl.constexpr = SIDE,
):  # fmt: skip
    """(descriptor of the high plane, of the low plane, pointer to the exponents) of an operand, like `tile.operand`.

    BY_K is True if the reduction runs along its rows, False if it runs along its columns. `stride` is that of its rows.
    Without a low plane, its descriptor must not be used. With "redo", the result is the operand itself.
    """
    if PRECISION == "redo":
        return operand
    else:
        high_ptr = operand[0]
        exponents_ptr = operand[1] + tl.cdiv(size, SIDE) * tl.cdiv(length, SIDE)
        if BY_K:
            low_ptr = high_ptr + size.to(tl.int64) * stride
            high = tl.make_tensor_descriptor(high_ptr, [size, length], [stride, 1], [BLOCK, BLOCK_K])
            low = tl.make_tensor_descriptor(low_ptr, [size, length], [stride, 1], [BLOCK, BLOCK_K])
        else:
            low_ptr = high_ptr + length.to(tl.int64) * stride
            high = tl.make_tensor_descriptor(high_ptr, [length, size], [stride, 1], [BLOCK_K, BLOCK])
            low = tl.make_tensor_descriptor(low_ptr, [length, size], [stride, 1], [BLOCK_K, BLOCK])
        return high, low, exponents_ptr


@triton.jit
def block_index(at, k, size, length, BY_K: tl.constexpr, SIDE: tl.constexpr = SIDE):
    """The index of the operand's block that has row `at` of the product and index k of the reduction."""
    if BY_K:
        return (at // SIDE) * tl.cdiv(length, SIDE) + k // SIDE
    else:
        return (k // SIDE) * tl.cdiv(size, SIDE) + at // SIDE


@triton.jit
def load_exponents(
    exponents_ptr, at, k, size, length, BLOCK: tl.constexpr, BY_K: tl.constexpr, OWN: tl.constexpr,
    SIDE: tl.constexpr = SIDE,
):  # fmt: skip
    """The exponent of an operand's block; with OWN, those of BLOCK rows of the product from `at` on, (BLOCK, 1)."""
    block = block_index(at, k, size, length, BY_K)
    if OWN:
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
    OWN: tl.constexpr,  # True if a block of a has an exponent for each row of the product; False: one for all
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
    a_exponent = load_exponents(a_exponents, m, begin, M, K, BLOCK_M, A_BY_K, OWN)
    b_exponent = load_exponents(b_exponents, n, begin, N, K, BLOCK_N, B_BY_K, False)
    for k in range(begin, end, BLOCK_K):
        exponent = a_exponent + b_exponent
        after = tl.minimum(k + BLOCK_K, end - 1)
        a_exponent = load_exponents(a_exponents, m, after, M, K, BLOCK_M, A_BY_K, OWN)
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
def restored(
    operand, at, k, size, length, end, stride_row, stride_k,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BY_K: tl.constexpr, OWN: tl.constexpr, OFFSET: tl.constexpr,
    LOW: tl.constexpr = LOW, SIDE: tl.constexpr = SIDE,
):  # fmt: skip
    """The (BLOCK, BLOCK_K) tile of an operand in fp32, from its row `at` and index k of the reduction on.

    It is loaded from the fp32 tensor, or computed from its two planes.
    """
    rows, ks = at + tl.arange(0, BLOCK), k + tl.arange(0, BLOCK_K)
    mask = (rows < size)[:, None] & (ks < end)[None, :]
    ptrs = operand[0] + rows.to(OFFSET)[:, None] * stride_row + ks.to(OFFSET)[None, :] * stride_k
    high = tl.load(ptrs, mask=mask, other=0.0)
    if high.dtype == tl.float32:
        return high
    else:
        plane = size.to(tl.int64) * stride_row if BY_K else length.to(tl.int64) * stride_k
        low = tl.load(ptrs + plane, mask=mask, other=0.0)
        exponents_ptr = operand[1] + tl.cdiv(size, SIDE) * tl.cdiv(length, SIDE)
        exponent = load_exponents(exponents_ptr, at, k, size, length, BLOCK, BY_K, OWN)
        value = (high.to(tl.float32) + low.to(tl.float32) * 2.0**-LOW) * power_of_two(-exponent)
        upper, lower = high.to(tl.int16, bitcast=True).to(tl.int32), low.to(tl.uint16, bitcast=True).to(tl.int32)
        halves = ((upper << 16) | lower).to(tl.float32, bitcast=True)
        return tl.where(tl.load(operand[1] + block_index(at, k, size, length, BY_K)) > 0, halves, value)


@triton.jit
def multiply_restored(
    a, b, m, n, M, N, K, begin, end, stride_am, stride_ak, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, OWN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The sums of `multiply_planes` in fp32, on FMA units. a and b are operands of "redo"."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(begin, end, BLOCK_K):
        left = restored(a, m, k, M, K, end, stride_am, stride_ak, BLOCK_M, BLOCK_K, A_BY_K, OWN, OFFSET)
        right = restored(b, n, k, N, K, end, stride_bn, stride_bk, BLOCK_N, BLOCK_K, B_BY_K, False, OFFSET)
        acc = dot(left, tl.trans(right), acc, "ieee")
    return acc


@triton.jit
def multiply_operands(
    a, b, m, n, M, N, K, begin, end, stride_am, stride_ak, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The product of two results of `plane_operand`: by `multiply_planes`, or with "redo" by `multiply_restored`."""
    if PRECISION == "redo":
        return multiply_restored(
            a, b, m, n, M, N, K, begin, end, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_BY_K, B_BY_K, OWN, OFFSET,
        )  # fmt: skip
    else:
        return multiply_planes(
            a, b, m, n, M, N, K, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, A_BY_K, B_BY_K, OWN, PRECISION
        )


@triton.jit
def has_flags(info_ptr, rows, width, SIDE: tl.constexpr = SIDE):
    """True if any block of a (rows, width) operand is flagged."""
    blocks = tl.cdiv(rows, SIDE) * tl.cdiv(width, SIDE)
    flags = tl.zeros((1024,), tl.int32)
    for first in range(0, blocks, 1024):
        block = first + tl.arange(0, 1024)
        flags |= tl.load(info_ptr + block, mask=block < blocks, other=0)
    return tl.max(flags, axis=0) > 0


@triton.jit
def is_flagged(info_ptr, at, begin, end, size, length, BY_K: tl.constexpr, SIDE: tl.constexpr = SIDE):
    """True if a product of the rows from `at` (within one block) over begin <= k < end meets a flagged block."""
    found = tl.zeros((32,), tl.int32)  # in every warp, so that no warp waits for another
    for first in range(begin // SIDE, tl.cdiv(end, SIDE), 32):
        block = first + tl.arange(0, 32)
        index = block_index(at, block * SIDE, size, length, BY_K)
        found |= tl.load(info_ptr + index, mask=block < tl.cdiv(end, SIDE), other=0)
    return tl.max(found, axis=0) > 0


@triton.jit
def meets_flags(
    a_info, b_info, m, n, begin, end, M, N, K, A_BY_K: tl.constexpr, B_BY_K: tl.constexpr,
):  # fmt: skip
    """True if the output tile at (m, n) of a product over begin <= k < end meets a flagged block of either operand."""
    return is_flagged(a_info, m, begin, end, M, K, A_BY_K) | is_flagged(b_info, n, begin, end, N, K, B_BY_K)
