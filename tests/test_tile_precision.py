"""fp32 products by 16-bit parts: errors compared with torch's fp32, and special numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tensor_core
import torch
from cases import bound
from hypothesis import given, settings
from hypothesis import strategies as st
from split_operands import product_by_planes, split_by_kernel
from torch import Tensor

from mlp_fused.kernels import layer_tiles, network_tiles
from mlp_fused.kernels.activations import IDENTITY
from mlp_fused.kernels.language import ROWS_OF_16_ELEMENTS, tl, triton
from mlp_fused.kernels.layer_backward import dgrad, wgrad
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.kernels.partial_sums import sum_partials
from mlp_fused.kernels.planes import PLANES, Form
from mlp_fused.kernels.tile import round_to_tf32
from mlp_fused.kernels.tile_config import TileConfig

BY_POINTERS = TileConfig(64, 32, 32, 8, 4, 1, precision="bf16x6")
BY_DESCRIPTORS = replace(BY_POINTERS, descriptors=True)
BY_PLANES = replace(BY_DESCRIPTORS, precision="fp16x3")
LENGTHS = [layer_tiles.SHORTEST_SPLIT + more for more in (0, 1, 12, 32, 64, 200)]
LARGEST = torch.finfo(torch.float32).max
TINIEST = 2.0**-149


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


# For each name, the distributions of two operands: activations and weights.
INPUTS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "normal": (normal, normal),
    "positive": (lambda rng, *shape: rng.random(shape),) * 2,
    "relu": (lambda rng, *shape: np.maximum(normal(rng, *shape), 0), normal),
    "wide range": (lambda rng, *shape: np.exp(normal(rng, *shape)) * rng.choice([-1, 1], shape),) * 2,
    "wide range, positive": (lambda rng, *shape: np.exp(normal(rng, *shape)),) * 2,
}


def draw(inputs: str, m: int, n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x (m, k) and w (n, k) of numbers that fp32 holds."""
    rng = np.random.default_rng([seed, k])
    x, w = INPUTS[inputs]
    return tensor_core.to_fp32(x(rng, m, k)), tensor_core.to_fp32(w(rng, n, k))


def assert_no_worse(x: np.ndarray, w: np.ndarray, ours: np.ndarray, torchs: np.ndarray) -> None:
    """Compare the norms of errors, and their largest entries relative to |x||w|ᵀ."""
    true, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
    errors, limits = np.abs(ours - true), np.abs(torchs - true)
    assert np.linalg.norm(errors) <= np.linalg.norm(limits)
    assert (errors / magnitude).max() <= (limits / magnitude).max()


def assert_within_bound(x: np.ndarray, w: np.ndarray, ours: np.ndarray, torchs: np.ndarray) -> None:
    """Use the bound of tests/cases.py, which allows twice torch's error: a library chooses the order of its sums."""
    true, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
    tensors = [torch.from_numpy(array) for array in (true, torchs, magnitude)]
    for order in (2, torch.inf):
        error = np.linalg.norm((ours - true).ravel(), order)
        assert error <= bound(*tensors, 2**-24, order)


@pytest.mark.parametrize("inputs", INPUTS)
def test_six_products_on_a_tensor_core_err_no_more_than_fp32(inputs: str) -> None:
    for k, seed in itertools.product(LENGTHS, range(3)):
        x, w = draw(inputs, 32, 32, k, seed)
        assert_no_worse(x, w, tensor_core.bf16x6(x, w), tensor_core.fma(x, w))


def relative_error(product: Callable, inputs: str, k: int, outputs: int = 64) -> float:
    """The norm of a product's errors for k terms, divided by that of FMA units."""
    errors = np.zeros((2, 3))
    for seed in range(3):
        x, w = draw(inputs, 64, outputs, k, seed)
        for row, multiply in enumerate((product, tensor_core.fma)):
            errors[row, seed] = np.linalg.norm(multiply(x, w) - x @ w.T)
    ours, theirs = np.linalg.norm(errors, axis=1)
    return ours / theirs


@pytest.mark.parametrize("by_row", [False, True], ids=["blocks", "rows"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_planes_on_a_tensor_core_err_no_more_than_fp32(inputs: str, by_row: bool) -> None:
    shortest = layer_tiles.SHORTEST_PLANES
    for k, seed in itertools.product((shortest, shortest + 44, 2 * shortest), range(3)):
        x, w = draw(inputs, 32, 32, k, seed)
        assert_no_worse(x, w, tensor_core.fp16x3_by_planes(x, w, by_row), tensor_core.fma(x, w))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("split", ["bf16x6", "fp16x3"])
def test_short_sums_of_a_network_err_little_more_than_fp32(split: str, inputs: str) -> None:
    """The network path uses these products from NARROWEST_SPLIT terms on.

    One product of bf16x6 errs 2.3 times as much as an FMA. Sums of 8 terms in fp16x3 err twice as much as with FMAs.
    """
    narrowest = network_tiles.NARROWEST_SPLIT[split]
    for k in (narrowest, narrowest + 1, 12, 16, 20, 33):
        if k >= narrowest:
            assert relative_error(getattr(tensor_core, split), inputs, k) <= 1.5, k


@pytest.mark.parametrize("inputs", INPUTS)
def test_sums_of_64_scaled_products_err_no_more_than_fp32(inputs: str) -> None:
    """The widest layer of scaled products has 64 terms. Positive ones would err more if a tensor core summed all 64."""
    assert relative_error(tensor_core.fp16x3, inputs, 64) <= 1.03
    if "positive" in inputs:
        assert relative_error(functools.partial(tensor_core.fp16x3, terms=64), inputs, 64) > 1.5


def test_scaled_parts_add_up() -> None:
    """Their sum has 22 bits for numbers down to 2^-28 of the largest. Below, it is within 2^-50 of the largest."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(-60, 1, 100_000)
    values = tensor_core.to_fp32(np.ldexp(1 + rng.random(sizes.shape), sizes) * rng.choice([-1, 1], sizes.shape))
    high, low = tensor_core.scaled_parts(values, 14)
    error = np.abs((high + low / 2.0**11) / 2.0**14 - values)
    assert (error <= np.maximum(2.0**-23 * np.abs(values), 2.0**-50)).all()
    assert np.abs(high).max() <= 2.0**15


@pytest.mark.parametrize("inputs", [inputs for inputs in INPUTS if "positive" in inputs])
def test_split_k_sums_of_a_library_err_less_and_within_the_bound(inputs: str) -> None:
    """cuBLAS splits K at 64x32 outputs. On an H100, it erred up to 1.28 times less than the kernels on such inputs."""
    x, w = draw(inputs, 64, 32, 256, 0)
    sliced = np.zeros((64, 32))
    for k in range(0, 256, 32):
        sliced = tensor_core.to_fp32(sliced + tensor_core.fma(x[:, k : k + 32], w[:, k : k + 32]))
    ours = tensor_core.bf16x6(x, w)
    with pytest.raises(AssertionError):
        assert_no_worse(x, w, ours, sliced)
    assert_within_bound(x, w, ours, sliced)


def test_parts_add_up() -> None:
    """Their sum is exact for numbers from 2^-120 on, and within 2^-147 for smaller ones."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = np.array([0, 1, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000, 0x7F7EFFFF, 0x7F7FFFFF], dtype=np.uint32)
    bits = np.concatenate([bits, bits & 0x807FFFFF, edges, edges | 0x80000000])
    values = bits[bits & 0x7FFFFFFF < 0x7F800000].view(np.float32).astype(np.float64)
    high, middle, low = tensor_core.parts(values)
    error = np.abs(high + middle / tensor_core.MIDDLE + low / tensor_core.LOW - values)
    assert error.max() <= 2.0**-147
    assert error[np.abs(values) >= 2.0**-120].max() == 0
    for part in (middle, low):  # no product of parts overflows unless the product of the numbers does
        assert (np.abs(part) <= np.abs(values) / 2 + 2.0**-126).all()


def by_forward(a: Tensor, b: Tensor, tile: TileConfig) -> Tensor:
    if tile.precision in PLANES:
        return product_by_planes("forward", a, b, tile)
    h = torch.full((a.shape[0], b.shape[0]), torch.nan, device=a.device)
    layer_forward(a, b, None, h, None, IDENTITY, "ieee", tile)
    return h


def by_dgrad(a: Tensor, b: Tensor, tile: TileConfig) -> Tensor:
    if tile.precision in PLANES:
        return product_by_planes("dgrad", a, b.t().contiguous(), tile)
    dx = torch.full((a.shape[0], b.shape[0]), torch.nan, device=a.device)
    dgrad(a, b.t().contiguous(), None, dx, None, IDENTITY, "ieee", tile)
    return dx


def by_wgrad(a: Tensor, b: Tensor, tile: TileConfig) -> Tensor:
    dw = torch.full((a.shape[0], b.shape[0]), torch.nan, device=a.device)
    db = torch.full((a.shape[0],), torch.nan, device=a.device)
    dz, h = a.t().contiguous(), b.t().contiguous()
    if tile.precision in PLANES:
        dw = product_by_planes("wgrad", dz, h, tile)[0]
        sum_partials(split_by_kernel(dz, Form("columns", own=True)).sums, (db,))
    else:
        wgrad(dz, h, dw, db, "ieee", tile)
    check_entries(db[:, None], a, torch.ones((1, a.shape[1]), device=a.device))
    return dw


# Each function computes a bᵀ.
PRODUCTS = {"forward": by_forward, "dgrad": by_dgrad, "wgrad": by_wgrad}
every_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
needs_rows_of_16_bytes = pytest.mark.skipif(
    ROWS_OF_16_ELEMENTS, reason="the rows are multiples of 16 bytes; this Triton's interpreter needs 16 elements"
)
every_tile = pytest.mark.parametrize(
    "tile",
    [
        BY_POINTERS,
        pytest.param(BY_DESCRIPTORS, marks=needs_rows_of_16_bytes),
        pytest.param(BY_PLANES, marks=needs_rows_of_16_bytes),
    ],
    ids=str,
)


def check_entries(ours: Tensor, a: Tensor, b: Tensor, tile: TileConfig = BY_POINTERS) -> None:
    """Assert that every entry of a bᵀ is NaN or infinite like torch's, or within the bound of tests/cases.py.

    Entries whose terms overflow only in the sum are left out, because they depend on the order of the sum. The bound
    allows an error of 2^-147 in the operands, which matters if they are denormal. Planes may err by 2^-21 |a||b|, which
    is more than the bound of a short sum.
    """
    torchs = a @ b.t()
    wide_a, wide_b = a.double(), b.double()
    true = wide_a @ wide_b.t()
    products = wide_a[:, None, :] * wide_b[None, :, :]
    special = ~products.isfinite()
    magnitude = products.abs().masked_fill(special, 0).sum(2)
    safe = magnitude < LARGEST * (1 - 2**-10)
    overflows = ~special.any(2) & (true.abs() == magnitude) & (magnitude > LARGEST * (1 + 2**-10))
    clear = true.isnan() | safe | overflows
    assert ours.isnan()[clear].equal(torchs.isnan()[clear])
    infinite = clear & torchs.isinf()
    assert ours[infinite].equal(torchs[infinite])
    finite = safe & ~special.any(2)
    length = a.shape[1]
    roundings = 8 if tile.precision in PLANES else 4
    roundings += 0 if a.device.type == "cpu" else length / 4  # tensor cores truncate every addend
    limit = 2 * (torchs.double() - true).abs() + 2**-24 * true.abs() + roundings * 2**-24 * magnitude
    moved = wide_a.abs().nan_to_num(0, 0).sum(1)[:, None] + wide_b.abs().nan_to_num(0, 0).sum(1)
    limit += 4 * TINIEST * (moved + length)
    error = (ours.double() - true).abs()
    worst = (error / limit)[finite]
    assert ours[finite].isfinite().all()
    assert worst.numel() == 0 or worst.max() <= 1


def both_signs(*numbers: float | str) -> list[int]:
    """The bits of fp32 numbers with both signs. A text stands for bits in hexadecimal."""
    positive = [
        int(number, 16) if isinstance(number, str) else int(np.float32(number).view(np.uint32)) for number in numbers
    ]
    return [bits | sign for bits in positive for sign in (0, 1 << 31)]


def fp32(bits: list[int]) -> np.ndarray:
    """The numbers with these bits. A numeric conversion would make every NaN quiet."""
    return np.array(bits, dtype=np.uint32).view(np.float32)


ORDINARY = both_signs(0.0, 1.0, 0.5, 1 + 2**-23, "3F80FFFF", "3FFFFFFF", 1e-8, 1e8, 3e-15)
# Numbers that are denormal in bf16 or too small for it, or have such parts.
TINY = both_signs(
    1e-45, 1e-41, "FFFF", 2.0**-133, "1FFFF", 1e-39, 1e-38, "7FFFFF", 2.0**-126, 1.3e-38, 1e-37, 1.7e-36, 1e-30
)
# Numbers that overflow in bf16, or whose scaled parts or products of parts overflow.
HUGE = both_signs(LARGEST, "7F7F8000", "7F7F7FFF", "7F7EFFFF", "7F00FFFF", 2.0**127, 1.7 * 2.0**126, "7E80FFFF", 3e37)
HUGE += both_signs(2.0**64, 1.9 * 2.0**63)
# NaN: quiet, signalling, and with all mantissa bits in the half that bf16 drops.
NOT_FINITE = both_signs("7F800000", "7FC00000", "7FA00000", "7F800001", "7F80BEEF")
RANGES = {
    "tiny": ORDINARY + TINY,
    "huge": ORDINARY + HUGE,
    "finite": ORDINARY + TINY + HUGE,
    "any": ORDINARY + TINY + HUGE + NOT_FINITE,
}


def column(bits: list[int], length: int, k: int, device: str) -> Tensor:
    """A matrix with the numbers in column k and zeros elsewhere. The number of rows is a multiple of four."""
    matrix = np.zeros((-(-len(bits) // 4) * 4, length), dtype=np.float32)
    matrix[: len(bits), k] = fp32(bits)
    return torch.from_numpy(matrix).to(device)


@every_product
@every_tile
@pytest.mark.parametrize("values", RANGES)
def test_every_pair_of_special_numbers(values: str, tile: TileConfig, product: Callable, device: str) -> None:
    for length, k in ((32, 0), (40, 37)):
        a = column(RANGES[values], length, k, device)
        check_entries(product(a, a, tile), a, a)


@every_product
@every_tile
@pytest.mark.parametrize("scale", [1.0, 2.0**-3])
def test_products_close_to_overflow(scale: float, tile: TileConfig, product: Callable, device: str) -> None:
    """Multiply numbers between 1 and 2 by 2^127, as single products and as sums."""
    significands = 1 + torch.rand((36, 1), generator=torch.Generator().manual_seed(2))
    a, b = torch.zeros((2, 40)), torch.zeros((36, 40))
    a[0, 3], a[1, 8:40:4] = 2.0**127 * scale, 2.0**124 * scale
    b[:, 3], b[:, 8:40:4] = significands[:, 0], significands
    a, b = torch.cat([a, -a]).to(device), b.to(device)
    check_entries(product(a, b, tile), a, b, tile)


places = st.tuples(st.booleans(), st.integers(0, 35), st.integers(0, 127), st.sampled_from(RANGES["any"]))


@every_product
@every_tile
@settings(deadline=None, max_examples=20)
@given(
    drawn=st.lists(places, min_size=1, max_size=12),
    length=st.sampled_from([4, 32, 36, 64, 100, 128]),
    ordinary=st.booleans(),
)
def test_special_numbers_anywhere(
    tile: TileConfig, product: Callable, device: str, drawn: list, length: int, ordinary: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    operands = [(torch.randn((rows, length), generator=generator) * ordinary).numpy() for rows in (36, 20)]
    for second, row, k, bits in drawn:
        operands[second][row % len(operands[second]), k % length] = fp32([bits])[0]
    a, b = (torch.from_numpy(operand).to(device) for operand in operands)
    check_entries(product(a, b, tile), a, b, tile)


@every_product
@every_tile
@pytest.mark.parametrize("inputs", INPUTS)
def test_kernels_err_no_more_than_fp32(inputs: str, tile: TileConfig, product: Callable, device: str) -> None:
    """Errors are at most those of sequential FMAs, and within the bound of torch's product."""
    shortest = layer_tiles.SHORTEST_PLANES if tile is BY_PLANES else layer_tiles.SHORTEST_SPLIT
    for k in (shortest, shortest + 12, 256):
        x, w = draw(inputs, 64, 32, k, 0)
        a, b = (torch.from_numpy(operand).float().to(device) for operand in (x, w))
        ours, torchs = (result.double().cpu().numpy() for result in (product(a, b, tile), a @ b.t()))
        assert_no_worse(x, w, ours, tensor_core.fma(x, w))
        assert_within_bound(x, w, ours, torchs)


# tf32


@triton.jit
def rounding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, round_to_tf32(tl.load(x_ptr + offsets)))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, ties away from zero, by the definition in fp64."""
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(x.astype(np.float64))
        exponent = np.maximum(exponent, -125)  # denormals all have the same step
        scaled = x * 2.0 ** (11.0 - exponent)
        return np.where(np.isfinite(x), np.copysign(np.floor(np.abs(scaled) + 0.5), x) * 2.0 ** (exponent - 11.0), x)


@pytest.mark.parametrize("seed", range(3))
def test_fp32_is_rounded_to_the_nearest_tf32(seed: int, device: str) -> None:
    """Try normal numbers, denormals, ties, infinities, and NaN, including NVIDIA's with all bits set."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, 1024, dtype=np.uint32)
    special = [
        0x7F800000,
        0xFF800000,
        0x7FFFFFFF,
        0x7FC00000,
        0x44801000,
        0x44800FFF,
        0xC4803000,
        0x7F7FEFFF,
        0,
        1,
        2**31,
    ]
    bits[: len(special)] = special
    x = torch.from_numpy(bits.view(np.float32)).to(device)
    y = torch.full_like(x, 3.0)
    rounding_kernel[(1,)](x, y, 1024)
    expected = to_tf32(bits.view(np.float32)).astype(np.float32)
    np.testing.assert_array_equal(y.cpu().numpy(), expected)
    assert not (y.cpu().view(torch.int32)[y.cpu().isfinite()] & 0x1FFF).any()
    assert y[4] == 1025  # the tie 1024.5, rounded like torch.matmul on an RTX 3090 (pytorch issue 53635)
