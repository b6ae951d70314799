"""The tile arithmetic that every kernel shares: the one wrapper around tl.dot, the loop over the reduction, the store.

Triton's interpreter multiplies bf16 operands wrongly, and truncates where it should round to bf16. Only `dot` and
`round_to` correct this, so kernels multiply, round and store through `dot`, `round_to` and `store`.

PRECISION is the way in which operands are multiplied:

- "ieee": 16-bit operands as they are, fp32 on FMA units;
- "tf32": fp32 rounded to tf32, on tensor cores;
- "bf16x6": full fp32 accuracy on tensor cores. Each operand is split into three bf16 parts, and six of their nine
  products are added;
- "fp16x3": full fp32 accuracy on tensor cores. Each operand is scaled and split into two fp16 parts, and three of their
  four products are added. The layer kernels read operands split beforehand (planes.py), the network kernels split
  them in registers;
- "fp16x1": the accuracy of tf32. It is the product of the high parts of "fp16x3", whose mantissas have tf32's 10 bits;
- "redo": the same as "ieee", but only for output tiles for which the planes of "fp16x3" or "fp16x1" are not accurate
  (planes.py).
"""

from __future__ import annotations

from .language import INTERPRETED, tl, triton

__all__ = [
    "activate",
    "differentiate",
    "dot",
    "in_layout",
    "load_tile",
    "multiply",
    "operand",
    "relu_to",
    "result",
    "round_to",
    "split_columns",
    "store",
    "store_tile",
    "tile_position",
]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in acc's dtype."""
    if PRECISION == "bf16x6":
        # The running sum stays outside the tensor cores: they round it toward zero, which makes the error of a long sum
        # a hundred times that of fp32 (Ootomo and Yokota, arXiv 2203.03341).
        return acc + dot_split(a, b)
    elif PRECISION == "fp16x3":
        return acc + dot_scaled(a, b, 2)
    elif PRECISION == "fp16x1":
        return acc + dot_scaled(a, b, 1)
    else:
        if INTERPRETED:
            a = widen(a).to(acc.dtype)
            b = widen(b).to(acc.dtype)
        elif PRECISION == "tf32" and a.dtype == tl.float32:
            a = round_to_tf32(a)
            b = round_to_tf32(b)
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def round_to_tf32(value):
    """fp32 rounded to the 10 bits of mantissa that tensor cores read, to nearest with ties away from zero.

    cuBLAS rounds the same way (pytorch issue 53635). Tensor cores by themselves cut the other bits off, which made the
    error of a simulated product 2.6 times as large. NaN and infinities stay as they are.
    """
    bits = value.to(tl.uint32, bitcast=True)
    infinite: tl.constexpr = 0x7F800000
    bits = tl.where((bits & infinite) == infinite, bits, (bits + 0x1000) & 0xFFFFE000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot_split(a, b):
    """a b of fp32 operands: the sum of six products of their bf16 parts, the smallest first.

    The three products that are left out are smaller than 2^-24 |a||b|.
    """
    a_high, a_middle, a_low = split_operand(a)
    b_high, b_middle, b_low = split_operand(b)
    # The scale of middle is 2^-6, that of low 2^-13. The first three products are summed at the scale 2^-13. Middle
    # times middle has 2^-12, so one of the two is doubled.
    small = dot(
        round_to(widen(a_middle) * 2.0, tl.bfloat16), b_middle, tl.zeros((a.shape[0], b.shape[1]), tl.float32), "ieee"
    )
    small = dot(a_high, b_low, small, "ieee")
    small = dot(a_low, b_high, small, "ieee") * 2.0**-7
    small = dot(a_high, b_middle, small, "ieee")
    small = dot(a_middle, b_high, small, "ieee")
    # If an operand is not finite, this sum is NaN. The product of the high parts alone is then the result.
    small = tl.where(tl.abs(small) < float("inf"), small * 2.0**-6, 0.0)
    return dot(a_high, b_high, small, "ieee")


@triton.jit
def split_operand(value):
    """(high, middle, low) in bf16 with value = high + 2^-6 middle + 2^-13 low, exactly; denormals to within 2^-147.

    The scales keep the parts of small numbers from underflowing. Products of the parts of large numbers overflow no
    earlier than products of the numbers themselves; high is truncated, not rounded, for the same reason.
    """
    bits = value.to(tl.uint32, bitcast=True)
    # A tiny number or a NaN may have all its bits in the lower half. One bit is then set in the upper half, so that
    # high does not become 0 or infinite.
    one_up = ((bits & 0xFFFF) + 0xFFFF) & 0x10000
    tiny_or_nan = ((bits & 0x7FFFFFFF) - 0x10000).to(tl.uint32) >= 0x7F7F0000
    high_bits = (bits & 0xFFFF0000) | tl.where(tiny_or_nan, one_up, 0)
    high = (high_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    rest = (value - high_bits.to(tl.float32, bitcast=True)) * 2.0**6
    middle = round_to(rest, tl.bfloat16)
    return high, middle, round_to((rest - widen(middle)) * 2.0**7, tl.bfloat16)


# A tensor core truncates the running sum after every 16 terms. If it adds up 64 positive products, the sum errs up to
# twice as much as a chain of FMAs. Two sums of 32, added in fp32 outside the tensor core, err no more than the chain
# (tests/test_tile_precision.py).
TERMS_INSIDE = 32
LOW_SCALE = 2.0**11  # keeps the low parts of small numbers from underflowing
# Both constants are defaults of arguments, for the reason that planes.py gives at SIDE.


@triton.jit
def dot_scaled(
    a, b, PARTS: tl.constexpr, TERMS_INSIDE: tl.constexpr = TERMS_INSIDE, LOW_SCALE: tl.constexpr = LOW_SCALE
):  # fmt: skip
    """a b of fp32 operands, as products of their scaled fp16 parts.

    Each row of `a`, and `b` as a whole, is multiplied by a power of two, and the result by the inverse of both. So the
    parts of numbers of any size fit in fp16, and a row of `a` has the same relative error at any scale. A number has
    22 bits if it is at least 2^-28 of the largest number in its row of `a`, or in `b`. Below that, its absolute error
    is 2^-50 of that largest number.

    Infinities and NaN come out as in fp32, with two exceptions:

    - An infinity times a tiny number is NaN. A number is tiny if it is below 2^-40 of that largest number: then its
      high part is 0.
    - If the largest number in a row of `a` times the largest in `b` is 2^156 or more, that row is infinite or NaN, even
      if the two do not meet.

    Args:
        PARTS: 2 for the accuracy of fp32, 1 for that of tf32.
    """
    # Infinities in `b` affect only their own columns, so the other columns must keep their scale.
    b_sizes = tl.where(tl.abs(b) < float("inf"), tl.abs(b), 0.0)
    b_exponent = scaling_exponent(tl.max(tl.max(b_sizes, axis=1), axis=0), 126)
    # The inverse of both scales has to be an fp32 number, if only a denormal one.
    a_exponent = scaling_exponent(tl.max(tl.abs(a), axis=1), tl.minimum(149 - b_exponent, 126))
    unscale = power_of_two(-a_exponent) * power_of_two(-b_exponent)
    a_high, a_low = split_scaled(a * power_of_two(a_exponent)[:, None])
    b_high, b_low = split_scaled(b * power_of_two(b_exponent))
    COUNT: tl.constexpr = a.shape[1] // TERMS_INSIDE if PARTS == 2 and a.shape[1] > TERMS_INSIDE else 1
    a_highs = split_columns(a_high, COUNT)
    b_highs = split_columns(tl.trans(b_high), COUNT)
    zeros = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    total = zeros
    if PARTS == 2:
        a_lows = split_columns(a_low, COUNT)
        b_lows = split_columns(tl.trans(b_low), COUNT)
        for i in tl.static_range(COUNT):
            total = dot(a_highs[i], tl.trans(b_lows[i]), total, "ieee")
            total = dot(a_lows[i], tl.trans(b_highs[i]), total, "ieee")
        # If an operand is not finite, this sum is NaN. Any finite number may replace it, because the product of the
        # high parts is then infinite or NaN. On a GPU, the maximum of NaN and a number is the number.
        total = tl.where(total == total, total, 0.0) if INTERPRETED else tl.maximum(total, -1e38)
        total *= 1 / LOW_SCALE
    total = dot(a_highs[0], tl.trans(b_highs[0]), total, "ieee")
    for i in tl.static_range(1, COUNT):
        # An FMA, because the compiler would turn a sum into the accumulator of the product.
        total = tl.fma(dot(a_highs[i], tl.trans(b_highs[i]), zeros, "ieee"), 1.0, total)
    return total * unscale[:, None]


@triton.jit
def split_scaled(value, LOW_SCALE: tl.constexpr = LOW_SCALE):
    """(high, low) in fp16 with value = high + low / LOW_SCALE, to 22 bits."""
    high = value.to(tl.float16)
    return high, ((value - high.to(tl.float32)) * LOW_SCALE).to(tl.float16)


@triton.jit
def scaling_exponent(largest, most):
    """The exponent of the power of two that scales `largest` to [2^14, 2^15), below fp16's limit; at most `most`."""
    biased = largest.to(tl.int32, bitcast=True) >> 23
    return tl.minimum(127 + 14 - biased, most)


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """`value` rounded to dtype, to nearest with ties to even."""
    if value.dtype == dtype:
        return value
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, nearest, bits | 0x400000)  # NaN: set a bit that truncation keeps
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def relu_to(z, dtype: tl.constexpr):
    """relu(z) of fp32, rounded to bf16 or fp16, to nearest with ties to even. NVIDIA only: see `rounds_with_relu`.

    It is one instruction for two elements. A comparison and the rounding are five, and the compiler does not merge them
    if z comes from a tensor core.
    """
    if INTERPRETED:
        return round_to(tl.where(z < 0, 0.0, z), dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [z], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [z], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def widen(value):
    """A bf16 `value` converted to fp32, exactly; other dtypes unchanged. (The interpreter's cast loses denormals.)"""
    if value.dtype != tl.bfloat16:
        return value
    if INTERPRETED:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def store(ptrs, value, mask):
    """Write `value`, rounded to the dtype that ptrs point to, where mask holds."""
    tl.store(ptrs, round_to(value, ptrs.dtype.element_ty), mask=mask)


@triton.jit
def activate(z, FORWARD: tl.constexpr, PARAMETERS: tl.constexpr):
    """h = a(z)."""
    if len(PARAMETERS) == 0:
        return FORWARD(z)
    elif len(PARAMETERS) == 1:
        return FORWARD(z, PARAMETERS[0])
    else:
        tl.static_assert(len(PARAMETERS) == 2, "an activation has at most two parameters")
        return FORWARD(z, PARAMETERS[0], PARAMETERS[1])


@triton.jit
def differentiate(dh, saved, BACKWARD: tl.constexpr, PARAMETERS: tl.constexpr):
    """dz = dh a'(z), from the saved tensor."""
    if len(PARAMETERS) == 0:
        return BACKWARD(dh, saved)
    elif len(PARAMETERS) == 1:
        return BACKWARD(dh, saved, PARAMETERS[0])
    else:
        tl.static_assert(len(PARAMETERS) == 2, "an activation has at most two parameters")
        return BACKWARD(dh, saved, PARAMETERS[0], PARAMETERS[1])


@triton.jit
def in_layout(value, like):
    """An fp32 `value` in the layout of `like`. Operations on both then use one layout only. NVIDIA only."""
    if INTERPRETED:
        return value
    else:
        # The compiler neither moves this instruction nor repeats it in another layout, because it reads both operands.
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [value, like], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def tile_position(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of the (BLOCK_M, BLOCK_N) tile of an (M, N) output that a program computes, counted in tiles.

    Programs go through GROUP_M rows of tiles column by column, so that programs in flight share operands in L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def operand(
    ptr, size, length, stride_row, stride_k, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BY_K: tl.constexpr,
):  # fmt: skip
    """The tensor descriptor of an operand (size, length of the reduction); its pointer if BY_K is None.

    BY_K is True if neighbours along the reduction are adjacent in memory, False if neighbours along `size` are.
    """
    if BY_K is None:
        return ptr
    elif BY_K:
        return tl.make_tensor_descriptor(ptr, [size, length], [stride_row, 1], [BLOCK, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(ptr, [length, size], [stride_k, 1], [BLOCK_K, BLOCK])


@triton.jit
def result(ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """The tensor descriptor by which tiles of a contiguous (M, N) tensor are loaded and stored; else its pointer."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    else:
        return ptr


@triton.jit
def tile_offsets(m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OFFSET: tl.constexpr):
    """Offsets and mask of the tile of a contiguous (M, N) tensor whose first row and column are m and n."""
    rows = m + tl.arange(0, BLOCK_M)[:, None]
    cols = n + tl.arange(0, BLOCK_N)[None, :]
    return rows.to(OFFSET) * N + cols, (rows < M) & (cols < N)


@triton.jit
def load_tile(
    source, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OFFSET: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load a tile from `source`, which the function `result` returned. Its first row and column are m and n."""
    if DESCRIPTORS:
        return source.load([m, n])
    else:
        offsets, mask = tile_offsets(m, n, M, N, BLOCK_M, BLOCK_N, OFFSET)
        return tl.load(source + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(target, value, m, n, M, N, OFFSET: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Store a tile, rounded to the dtype of `target`, which the function `result` returned."""
    if DESCRIPTORS:
        target.store([m, n], round_to(value, target.dtype))
    else:
        offsets, mask = tile_offsets(m, n, M, N, value.shape[0], value.shape[1], OFFSET)
        store(target + offsets, value, mask)


@triton.jit
def split_columns(value, PARTS: tl.constexpr):
    """A tile's columns split into PARTS equal parts, from left to right; PARTS is a power of two."""
    if PARTS == 1:
        return (value,)
    else:
        halves = tl.reshape(value, (value.shape[0], 2, value.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)


@triton.jit
def multiply(
    a_source,  # an `operand` of M rows
    b_source,  # an `operand` of N rows
    m,  # first row of a
    n,  # first row of b
    M,
    N,
    begin,
    end,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,  # the integer type that holds any element's offset
    A_BY_K: tl.constexpr,  # BY_K of `operand`
    B_BY_K: tl.constexpr,
    EVEN: tl.constexpr,  # True if every block of k is whole
    SUM_A: tl.constexpr,
    COMPUTE: tl.constexpr = None,  # the dtype that operands are rounded to; None: a's
    FORWARD: tl.constexpr = None,  # an activation that b is passed through
    PARAMETERS: tl.constexpr = None,  # (An empty tuple does not compile as a default on Triton 3.6.)
):
    """(Σ_k a[m, k] b[n, k], Σ_k a[m, k]) over begin <= k < end, (BLOCK_M, BLOCK_N) and (BLOCK_M, 1).

    The second is computed only with SUM_A. With descriptors, `end` must be the end of the operands, or whole blocks
    after `begin`: a descriptor masks nothing before the end of its tensor.
    """
    A_DTYPE: tl.constexpr = a_source.dtype.element_ty if A_BY_K is None else a_source.dtype
    OPERAND: tl.constexpr = A_DTYPE if COMPUTE is None else COMPUTE
    DTYPE: tl.constexpr = tl.float64 if OPERAND.primitive_bitwidth == 64 else tl.float32
    # 16-bit numbers are summed as a product with ones, on tensor cores. These would round fp32 numbers.
    BY_DOT: tl.constexpr = OPERAND.primitive_bitwidth == 16
    acc = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    sums = tl.zeros((BLOCK_M, 16 if BY_DOT else BLOCK_K), DTYPE)
    ks = tl.arange(0, BLOCK_K)
    rows = m + tl.arange(0, BLOCK_M)
    cols = n + tl.arange(0, BLOCK_N)
    if A_BY_K is None:
        offsets_k = (begin + ks).to(OFFSET)
        a_ptrs = a_source + rows.to(OFFSET)[:, None] * stride_am + offsets_k[None, :] * stride_ak
        b_ptrs = b_source + offsets_k[:, None] * stride_bk + cols.to(OFFSET)[None, :] * stride_bn
    mask_a = (rows < M)[:, None]
    mask_b = (cols < N)[None, :]
    for k in range(begin, end, BLOCK_K):
        if A_BY_K is not None:
            a = a_source.load([m, k]) if A_BY_K else tl.trans(a_source.load([k, m]))
            b = tl.trans(b_source.load([n, k])) if B_BY_K else b_source.load([k, n])
        elif EVEN:
            a = tl.load(a_ptrs, mask=mask_a, other=0.0)
            b = tl.load(b_ptrs, mask=mask_b, other=0.0)
        else:
            inside = ks < end - k
            a = tl.load(a_ptrs, mask=mask_a & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_b & inside[:, None], other=0.0)
        a = round_to(a, OPERAND)
        if FORWARD is not None:
            b = activate(b.to(DTYPE), FORWARD, PARAMETERS)
            b = tl.where(mask_b & (ks < end - k)[:, None], b, 0.0)  # a(0) need not be finite
        b = round_to(b, OPERAND)
        acc = dot(a, b, acc, PRECISION)
        if SUM_A and BY_DOT:
            sums = dot(a, round_to(tl.full((BLOCK_K, 16), 1.0, DTYPE), OPERAND), sums, PRECISION)
        elif SUM_A:
            sums += a.to(DTYPE)
        if A_BY_K is None:
            a_ptrs += tl.full((), BLOCK_K, OFFSET) * stride_ak
            b_ptrs += tl.full((), BLOCK_K, OFFSET) * stride_bk
    if BY_DOT:  # all columns are equal
        return acc, tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, sums, 0.0), axis=1)[:, None]
    else:
        return acc, tl.sum(sums, axis=1)[:, None]
