"""Candidate tiles of the layer kernels, sorted by estimated time. They depend on the problem and the device alone.

Tiles that spill registers are left out (tests/compile_kernels.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from .devices import BLACKWELL, DESCRIPTOR_ARCHITECTURES, Device
from .estimate import LAUNCH, RATES, Rates, kernel_seconds, torch_seconds
from .language import TRITON_VERSION
from .tile_config import Problem, TileConfig, count_tiles, on_fma_units, resident, shared_memory

__all__ = [
    "SHORTEST_PLANES", "SHORTEST_SPLIT", "candidates", "choose", "planes_seconds", "planes_tile",
    "prefers_planes", "why_torch",
]  # fmt: skip

# Output tiles, (block_m, block_n). Those with a side of 256 are used only through descriptors.
OUTPUT_TILES = (
    (256, 128), (128, 256), (128, 128), (64, 256), (128, 64), (64, 128), (64, 64), (64, 32),
    (32, 128), (32, 64), (32, 32), (16, 128), (16, 64), (16, 32),
)  # fmt: skip
LONGEST_SIDE = 128  # the longest side of tiles that are also used without descriptors
LONGEST_UNALIGNED = 64  # the longest side if rows are not 16-byte aligned, on tensor cores
# The largest output tile of bf16x6, by architecture: it also holds three 16-bit parts of each operand. On Blackwell,
# larger products overflow tensor memory.
LARGEST_SPLIT: dict[int | str, int] = {80: 128 * 64, 90: 128 * 128, 100: 128 * 64, 103: 128 * 64}
WAITING_WORDS = 32  # the most words of a saved tile that a thread may hold during dgrad's products
# The shortest reduction for which bf16x6 is no less accurate than torch's own fp32 (tests/test_tile_precision.py).
SHORTEST_SPLIT = 64
# The architectures on which fp32 operands are split into fp16 planes (planes.py). On an H200, products by "fp16x3" were
# 3.4 to 3.9 times as fast as torch's, not counting the splits (tests/data/h200/planes.jsonl). The kernel has changed
# since these readings: a block of dz had one exponent, and now each of its rows or columns has one. A step over the
# reduction still has 12 wgmma and 3 waits, and at most 5 % more instructions (tests/test_kernels_compile.py). The
# epilogues now also split their results. This was not measured yet.
PLANES_ARCHITECTURES: tuple[int | str, ...] = (90,)
SHORTEST_PLANES = 256  # the shortest side of a product for which its operands are split
PLANES_MARGIN = 1.3  # a product by planes runs only if torch's estimated time is this many times its own
# The rate of products by planes on a multiprocessor, as a share of the data sheet's for 16 bits: 166 of 989 TFLOP/s. It
# is the slowest reading of a sketch of the loop, in which a whole row had one scale (NVIDIA H100, torch 2.11, triton
# 3.6). With exponents of blocks, an H200 reached 174 to 193 TFLOP/s.
PLANES_RATE = 0.168
# The rates of a split, and of one that also sums rows, as shares of the data sheet's bandwidth: 3.0 and 1.16 of
# 4.8 TB/s (NVIDIA H200, tests/data/h200/planes.jsonl).
SPLIT_RATE, SUMS_RATE = 0.63, 0.24
PLANES_LAUNCHES = 4 * LAUNCH  # two splits, the product, "redo"
# Estimates are off by a tenth in the median. Our kernel runs only if torch's estimated time is this many times ours.
MARGIN = 1.08
# Up to this many rows, torch computes products: our kernels take five times as long (1 row, NVIDIA H100, torch 2.11,
# triton 3.6).
FEW_ROWS = 16
BLOCK_K = {"bf16x6": 32, "tf32": 32, "ieee": 16}  # for fp32; 16-bit operands have 64


def _power_of_two(size: int, least: int, most: int) -> int:
    """`size` rounded up to a power of two, at least `least` (16, the side of a tensor core) and at most `most`."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def choose(problem: Problem, device: Device, rates: Rates = RATES) -> TileConfig:
    """The tile with the least estimated time."""
    return candidates(problem, device, rates)[0]


def candidates(problem: Problem, device: Device, rates: Rates = RATES) -> tuple[TileConfig, ...]:
    """The tiles worth measuring for a problem: the one with the least estimated time, the one of planes, the others."""
    return _candidates(problem, device, rates)


@functools.lru_cache(maxsize=4096)
def _candidates(problem: Problem, device: Device, rates: Rates) -> tuple[TileConfig, ...]:
    if problem.kind == "output_gradient":
        block_n = _power_of_two(problem.n, 16, 128)
        return (TileConfig(4096 // block_n, block_n),)
    tiles = [
        tile
        for precision in _precisions(problem, device)
        for sides in OUTPUT_TILES
        for tile in _tiles(problem, device, precision, *sides)
    ]
    tiles.sort(key=lambda tile: kernel_seconds(problem, tile, device, rates))
    planes = planes_tile(problem, device)
    planes_second = [*tiles[:1], *([] if planes is None else [planes]), *tiles[1:]]
    return tuple(dict.fromkeys([*planes_second, *_specialized(problem, device, tiles)]))


def planes_tile(problem: Problem, device: Device) -> TileConfig | None:
    """The tile for a product of fp32 operands from fp16 planes; None if they are not meant for this product.

    "fp16x3" for full fp32, "fp16x1" where tf32 is allowed.
    """
    if device.arch not in PLANES_ARCHITECTURES or problem.dtype != torch.float32:
        return None
    if not problem.aligned or min(problem.m, problem.n, problem.k) < SHORTEST_PLANES:
        return None
    parts = 1 if problem.kind == "wgrad" else 4
    # With one plane, blocks of the reduction are twice as long, so that sums leave the tensor cores half as often.
    precision, block_k = ("fp16x1", 128) if problem.precision == "tf32" else ("fp16x3", 64)
    tile = TileConfig(128, 128, block_k, 8, 8, 3, precision=precision, descriptors=True, parts=parts)
    split = min(device.multiprocessors // count_tiles(problem, tile), problem.k // (8 * tile.block_k))
    split = split if problem.kind == "wgrad" and split > 1 else 1
    return dataclasses.replace(tile, split=split, programs=device.multiprocessors)


def planes_seconds(problem: Problem, tile: TileConfig, device: Device, written: bool = False) -> float:
    """Estimated seconds of a product by planes and of the split of both operands; infinite for an unknown device.

    `written` is True if the product that computes the first operand also writes its planes. They then take no pass of
    their own.
    """
    if device.tensor_16 is None or device.bandwidth is None:
        return float("inf")
    programs = count_tiles(problem, tile) * tile.split
    length = -(-problem.k // tile.split // tile.block_k) * tile.block_k
    flops = 2 * tile.block_m * tile.block_n * length * -(-programs // device.multiprocessors)
    rate = PLANES_RATE * device.tensor_16 / device.multiprocessors
    # A split reads an operand and writes its planes. If `written`, the first operand is not read again.
    first, second = (2 * side * problem.k * problem.dtype.itemsize for side in (problem.m, problem.n))
    if written:
        first, first_rate, launches = first // 2, SPLIT_RATE, PLANES_LAUNCHES - LAUNCH
    else:
        first_rate, launches = SUMS_RATE if problem.kind == "wgrad" else SPLIT_RATE, PLANES_LAUNCHES
    return flops / rate + (first / first_rate + second / SPLIT_RATE) / device.bandwidth + launches


def prefers_planes(
    problem: Problem,
    tile: TileConfig,
    device: Device,
    rates: Rates = RATES,
    written: bool = False,
) -> bool:
    """True if a product by planes is so much faster than torch, as estimated, that the backend "auto" uses it.

    `written` is as in `planes_seconds`.

    Always False where tf32 is allowed, because "fp16x1" is hardly faster than torch. It was measured with a simpler
    kernel, in which a whole row had one exponent. In a training step of 1024 -> 4096 -> 1024 over 8192 rows, products
    and splits took 1.02 ms with it, and torch's products 1.08 ms (NVIDIA H100, torch 2.11, triton 3.6; dgrad counted as
    a forward of its size). Today's kernels take longer, because they add the sums of blocks outside the tensor cores.
    """
    if problem.precision == "tf32":
        return False
    return PLANES_MARGIN * planes_seconds(problem, tile, device, written) <= torch_seconds(problem, device, rates)


def why_torch(problem: Problem, device: Device, rates: Rates = RATES) -> str | None:
    """The reason to leave an unmeasured product to torch; None if our kernel is expected to be faster.

    Torch computes the kinds of products for which our kernels were measured to be slower, whatever the estimate.
    Products by planes are not considered here: see `prefers_planes`, and `layer_steps.choose_tile`.
    """
    if problem.kind == "output_gradient":
        return None
    if problem.precision == "tf32" and problem.dtype == torch.float32:
        return "tf32 kernels were slower than torch where measured"
    if problem.rows <= FEW_ROWS:
        return f"kernels of up to {FEW_ROWS} rows were slower than torch where measured"
    ours = kernel_seconds(problem, choose(problem, device, rates), device, rates)
    return "estimated" if MARGIN * ours > torch_seconds(problem, device, rates) else None


def _specialized(problem: Problem, device: Device, tiles: Sequence[TileConfig]) -> list[TileConfig]:
    """Warp-specialised tiles, in which one warp only loads. They are worth measuring, but the rule never chooses them.

    Triton documents them for Blackwell alone. On Hopper, with four warps, it compiles them as meant too.
    """
    wanted = problem.kind in ("forward", "dgrad") and problem.dtype.itemsize == 2
    if device.arch != 90 or not wanted or TRITON_VERSION < (3, 7):  # older compilers fail on them
        return []
    return [
        dataclasses.replace(tile, num_warps=4, num_stages=3, parts=4, early=False, warp_specialize=True)
        for tile in tiles
        if tile.descriptors and tile.block_m == tile.block_n == 128
    ]


def _precisions(problem: Problem, device: Device) -> tuple[str, ...]:
    if problem.dtype != torch.float32 or problem.precision == "tf32":
        return (problem.precision,) if problem.dtype == torch.float32 else ("ieee",)
    has_bf16x6 = device.arch in LARGEST_SPLIT and problem.k >= SHORTEST_SPLIT
    return ("bf16x6", "ieee") if has_bf16x6 else ("ieee",)


def _tiles(problem: Problem, device: Device, precision: str, block_m: int, block_n: int) -> Iterator[TileConfig]:
    """The tiles with an output of (block_m, block_n), if they fit."""
    fma = on_fma_units(problem, precision)
    descriptors = problem.aligned and device.arch in DESCRIPTOR_ARCHITECTURES and not fma
    is_bf16x6 = precision == "bf16x6"
    # On Blackwell, a tile with a long side spills unless operands have 16 bits and it has at least 128 rows.
    spills = device.arch in BLACKWELL and (problem.dtype.itemsize > 2 or block_m == 64)
    if max(block_m, block_n) > LONGEST_SIDE and (is_bf16x6 or not descriptors or spills):
        return
    if is_bf16x6 and block_m * block_n > LARGEST_SPLIT[device.arch]:
        return
    sides = block_m, block_n
    block_m, block_n = _power_of_two(problem.m, 16, block_m), _power_of_two(problem.n, 16, block_n)
    longest_k = 64 if problem.dtype.itemsize == 2 else BLOCK_K[precision]
    if max(sides) > LONGEST_SIDE and ((block_m, block_n) != sides or problem.k < longest_k):
        return  # cut down to the problem's size, it equals another tile
    if not problem.aligned and not fma:  # elements are loaded one by one, which takes a pointer for every element
        longest_k //= 2
        if max(block_m, block_n) > LONGEST_UNALIGNED:
            return
    if descriptors and not is_bf16x6:  # operands stay in shared memory, so four warps can hold larger products
        needs_8_warps = block_m * block_n >= 128 * 128 and block_m > 64
    else:
        needs_8_warps = block_m * block_n > 64 * 64
    tile = TileConfig(
        block_m,
        block_n,
        _power_of_two(problem.k, 16, longest_k),
        group_m=8,
        num_warps=8 if needs_8_warps else 4,
        precision=precision,
        descriptors=descriptors,
    )
    for stages, parts in _depths(problem, device, tile):
        deep = dataclasses.replace(tile, num_stages=stages, parts=parts)
        if descriptors:
            waiting = block_m * block_n * problem.dtype.itemsize // (4 * 32 * tile.num_warps)
            early = problem.kind == "dgrad" and device.arch == 90 and not is_bf16x6 and waiting <= WAITING_WORDS
            deep = dataclasses.replace(deep, early=early)
            programs = device.multiprocessors * resident(problem, deep, device)
            deep = dataclasses.replace(deep, programs=programs)
        yield deep
        if problem.kind == "wgrad":
            # A split of fewer than 8 blocks of rows gains less than adding its partial sums costs.
            room = device.multiprocessors * resident(problem, deep, device) // count_tiles(problem, deep)
            split = min(room, problem.k // (8 * deep.block_k))
            if split > 1:
                yield dataclasses.replace(deep, split=split)


def _depths(problem: Problem, device: Device, tile: TileConfig) -> Iterator[tuple[int, int]]:
    """(stages, parts) of the deepest pipeline that fits, then of the deepest with which two programs fit together."""
    if device.backend == "hip":  # AMD's pipeline has two stages
        yield 2, 1
        return
    parts = [1]
    if problem.kind != "wgrad" and tile.descriptors:
        # A thread that holds many accumulators, or a saved tile, has few registers left for the epilogue.
        sums = tile.block_m * tile.block_n // (32 * tile.num_warps)
        least = sums // 32 if sums > 64 or problem.kind == "dgrad" else 1
        parts = [count for count in (1, 2, 4) if least <= count <= tile.block_n // 32] or [1]
    depths = [(stages, part) for stages in (4, 3) for part in parts] + [(2, part) for part in parts] + [(1, parts[-1])]

    def fits(depth: tuple[int, int], room: int) -> bool:
        stages, part = depth
        return shared_memory(problem, dataclasses.replace(tile, num_stages=stages, parts=part), device) <= room

    deepest = next((depth for depth in depths if fits(depth, device.shared_memory)), None)
    if deepest is not None:
        yield deepest
    if tile.block_m == tile.block_n == 128 and problem.kind != "dgrad" and tile.precision != "bf16x6":
        twice = next((depth for depth in depths if fits(depth, device.shared_memory // 2)), None)
        if twice not in (None, deepest):
            yield twice
