"""Products of fp32 operands on a tensor core, in three bf16 or two fp16 parts, and on FMA units, in numpy.

Products of bf16 and of fp16 are exact. An instruction adds 16 products of the reduction to the accumulator. It aligns
them to the largest one, truncates each a few bits below the last bit of the largest, and truncates the sum (Fasi,
Higham, Mikaitis and Pranesh, PeerJ CS 7:e330; Ootomo and Yokota, arXiv 2203.03341). Arrays are float64 that hold fp32
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bf16x6", "fma", "fp16x3", "fp16x3_by_planes", "parts"]

Array = NDArray[np.float64]

STEP = 16  # the terms of the reduction in one instruction
BITS_BELOW = 2  # the bits that the alignment keeps below the last bit of fp32
SIDE = 128  # the side of a block of elements with one exponent, as in kernels/planes.py
MIDDLE, LOW = 2.0**6, 2.0**13  # scales of the parts below the highest, as in kernels/tile.py


def _exponent(value: Array) -> NDArray[np.int32]:
    return np.frexp(np.where(np.isfinite(value), value, 0.0))[1]


def _shorten(value: Array, bits: int, least: int, round_to: Callable[[Any], Any]) -> Array:
    """A finite `value`, shortened to `bits` bits and to a multiple of 2^least."""
    unit = np.maximum(_exponent(value) - bits, least)
    return np.ldexp(round_to(np.ldexp(value, -unit)), unit)


def to_fp32(value: Array) -> Array:
    with np.errstate(over="ignore"):
        return value.astype(np.float32).astype(np.float64)


def dot(a: Array, b: Array, acc: Array) -> Array:
    """acc + a bᵀ for 16-bit numbers a (M, K) and b (N, K), as a tensor core accumulates it."""
    for k in range(0, a.shape[1], STEP):
        products = a[:, None, k : k + STEP] * b[None, :, k : k + STEP]
        terms = np.concatenate([products, acc[:, :, None]], axis=2)
        unit = _exponent(np.abs(terms).max(2)) - 24 - BITS_BELOW
        total = np.ldexp(np.trunc(np.ldexp(terms, -unit[:, :, None])).sum(2), unit)
        acc = _shorten(total, 24, -149, np.trunc)
    return acc


def parts(a: Array) -> tuple[Array, Array, Array]:
    """(high, middle, low), bf16 numbers with a = high + middle / 2^6 + low / 2^13. high is truncated."""
    high = _shorten(a, 8, -133, np.trunc)
    rest = (a - high) * MIDDLE
    middle = _shorten(rest, 8, -133, np.rint)
    return high, middle, _shorten((rest - middle) * (LOW / MIDDLE), 8, -133, np.rint)


def bf16x6(x: Array, w: Array, block: int = 32) -> Array:
    """x wᵀ for x (M, K) and w (N, K): six products of parts for a block of the reduction, blocks added in fp32."""
    acc = np.zeros((x.shape[0], w.shape[0]))
    for k in range(0, x.shape[1], block):
        high_a, middle_a, low_a = parts(x[:, k : k + block])
        high_b, middle_b, low_b = parts(w[:, k : k + block])
        small = dot(2 * middle_a, middle_b, np.zeros_like(acc))
        small = to_fp32(dot(low_a, high_b, dot(high_a, low_b, small)) * (MIDDLE / LOW))
        small = to_fp32(dot(middle_a, high_b, dot(high_a, middle_b, small)) / MIDDLE)
        acc = to_fp32(acc + dot(high_a, high_b, small))
    return acc


def scaled_parts(value: Array, exponent: NDArray[np.int32] | np.int32) -> tuple[Array, Array]:
    """(high, low), fp16 numbers with 2^exponent value = high + low / 2^11."""
    scaled = np.ldexp(value, exponent)
    high = scaled.astype(np.float16).astype(np.float64)
    return high, ((scaled - high) * 2.0**11).astype(np.float16).astype(np.float64)


def fp16x3(x: Array, w: Array, terms: int = 32) -> Array:
    """x wᵀ for x (M, K) and w (N, K): three products of scaled parts, with `terms` terms summed at a time."""
    x_exponent, w_exponent = 15 - _exponent(np.abs(x).max(1)), 15 - _exponent(np.abs(w).max())
    high_a, low_a = scaled_parts(x, x_exponent[:, None])
    high_b, low_b = scaled_parts(w, w_exponent)
    total = dot(low_a, high_b, dot(high_a, low_b, np.zeros((x.shape[0], w.shape[0])))) / 2.0**11
    total = dot(high_a[:, :terms], high_b[:, :terms], total)
    for k in range(terms, x.shape[1], terms):
        block = slice(k, k + terms)
        total = to_fp32(total + dot(high_a[:, block], high_b[:, block], np.zeros_like(total)))
    return to_fp32(np.ldexp(total, -(x_exponent[:, None] + w_exponent)))


def planes(a: Array, by_row: bool) -> tuple[Array, Array, Array]:
    """(high, low, exponent of each element) with a 2^exponent = high + low / 2^11, fp16 numbers, as in planes.py.

    A block has one exponent, or `by_row` one for each row.
    """
    exponents = np.zeros_like(a)
    for m in range(0, a.shape[0], SIDE):
        for k in range(0, a.shape[1], SIDE):
            block = np.s_[m : m + SIDE, k : k + SIDE]
            most = np.abs(a[block]).max(1 if by_row else None, keepdims=True)
            exponents[block] = np.clip(15 - _exponent(most), -63, 72 if by_row else 43)
    return *scaled_parts(a, exponents.astype(np.int32)), exponents


def fp16x3_by_planes(x: Array, w: Array, by_row: bool, block: int = 64) -> Array:
    """x wᵀ for x (M, K) and w (N, K): three products of planes for a block of the reduction, added in fp32.

    `by_row` gives each row of x an exponent of its own, as dz has.
    """
    high_x, low_x, exponent_x = planes(x, by_row)
    high_w, low_w, exponent_w = planes(w, by_row=False)
    acc = np.zeros((x.shape[0], w.shape[0]))
    for k in range(0, x.shape[1], block):
        part = np.s_[:, k : k + block]
        scale = np.exp2(-exponent_x[:, k][:, None] - exponent_w[:, k])
        acc = to_fp32(acc + dot(high_x[part], high_w[part], np.zeros_like(acc)) * scale)
        low = dot(high_x[part], low_w[part], dot(low_x[part], high_w[part], np.zeros_like(acc)))
        acc = to_fp32(acc + low * scale / 2**11)
    return acc


def fma(x: Array, w: Array) -> Array:
    """x wᵀ for x (M, K) and w (N, K). A sum is a chain of fused multiply-adds, as on a GPU's fp32 units."""
    acc = np.zeros((x.shape[0], w.shape[0]))
    for k in range(x.shape[1]):
        acc = to_fp32(x[:, k, None] * w[None, :, k] + acc)
    return acc
