"""The tile arithmetic that every kernel shares: the one wrapper around tl.dot, the loop over the reduction, the store.

Triton's interpreter multiplies bf16 operands wrongly and truncates when it rounds to bf16; `dot` and `round_to` are the
places where this is put right, so kernels load, go through these, and store through `store`.
"""

from __future__ import annotations

from .language import INTERPRETED, tl, triton

__all__ = ["activate", "differentiate", "dot", "multiply", "round_to", "store", "tile_position"]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in acc's dtype. PRECISION says how fp32 operands are multiplied: "ieee" or "tf32"."""
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """`value` rounded to dtype, to nearest with ties to even."""
    if value.dtype == dtype:
        return value
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, nearest, bits | 0x400000)  # NaN: set a bit that truncation keeps
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value.to(dtype)


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
    """dz = dh a'(z), from what was saved of z."""
    if len(PARAMETERS) == 0:
        return BACKWARD(dh, saved)
    elif len(PARAMETERS) == 1:
        return BACKWARD(dh, saved, PARAMETERS[0])
    else:
        tl.static_assert(len(PARAMETERS) == 2, "an activation has at most two parameters")
        return BACKWARD(dh, saved, PARAMETERS[0], PARAMETERS[1])


@triton.jit
def tile_position(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which (BLOCK_M, BLOCK_N) tile of an (M, N) output a program computes.

    Programs run through GROUP_M rows of tiles column by column, so that the ones in flight share operands in L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def multiply(
    a_ptr,
    b_ptr,
    rows,  # (BLOCK_M,) of the output
    cols,  # (BLOCK_N,) of the output
    M,
    N,
    begin,
    end,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN: tl.constexpr,
    SUM_A: tl.constexpr,
    COMPUTE: tl.constexpr = None,  # the dtype that operands are rounded to; None: a's
    FORWARD: tl.constexpr = None,  # an activation that b is passed through
    PARAMETERS: tl.constexpr = (),
):
    """Σ_k a[m, k] b[k, n] over begin <= k < end, (BLOCK_M, BLOCK_N); and with SUM_A, Σ_k a[m, k], (BLOCK_M, ·).

    The columns of the second sum are all alike. a and b lie anywhere, by their strides; OFFSET is the integer type that
    holds any element's offset. EVEN promises that every block of k is whole.
    """
    OPERAND: tl.constexpr = a_ptr.dtype.element_ty if COMPUTE is None else COMPUTE
    DTYPE: tl.constexpr = tl.float64 if OPERAND.primitive_bitwidth == 64 else tl.float32
    # A sum of 16-bit numbers is a product with ones, which tensor cores do beside the other; fp32 they would round.
    BY_DOT: tl.constexpr = OPERAND.primitive_bitwidth == 16
    acc = tl.zeros((rows.shape[0], cols.shape[0]), DTYPE)
    sums = tl.zeros((rows.shape[0], 16 if BY_DOT else 1), DTYPE)
    ks = tl.arange(0, BLOCK_K)
    offsets_k = (begin + ks).to(OFFSET)
    a_ptrs = a_ptr + rows.to(OFFSET)[:, None] * stride_am + offsets_k[None, :] * stride_ak
    b_ptrs = b_ptr + offsets_k[:, None] * stride_bk + cols.to(OFFSET)[None, :] * stride_bn
    mask_a = (rows < M)[:, None]
    mask_b = (cols < N)[None, :]
    for k in range(begin, end, BLOCK_K):
        if EVEN:
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
            sums += tl.sum(a.to(DTYPE), axis=1)[:, None]
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return acc, sums
