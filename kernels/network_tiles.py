"""Tiles of the network kernels, chosen from the problem and the device alone.

Up to the limits below, the kernels compile without spills for sm_80 to sm_100 and gfx942, unless a comment says
otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .devices import BLACKWELL, DESCRIPTOR_ARCHITECTURES, Device
from .tile_config import TileConfig

__all__ = [
    "NetworkProblem", "layer_groups", "network_precision", "network_tile", "network_wgrad_tile", "padded",
    "rounds_with_relu",
]  # fmt: skip


def padded(width: int) -> int:
    """A width padded for the network kernels: the next power of two, at least 16, the side of a tensor core."""
    return max(16, 1 << (width - 1).bit_length())


# recompute: the backward in one pass, from x alone. stored: the backward in one pass over the tensors that the forward
# stored. dgrad: the first of the two kernels dgrad and wgrad.
NetworkKind = Literal["forward", "recompute", "stored", "dgrad"]

# A program that sums weight gradients takes this many rows at a time.
WGRAD_ROWS = {2: 64, 4: 32, 8: 32}  # by bytes of an element
STREAMED_COLUMNS = {2: 64, 4: 32, 8: 32}  # columns of a wide first layer at a time, likewise
RESIDENT_INPUT = 256  # the widest input whose weight stays on the chip; a wider one is streamed
WIDEST_HIDDEN = 256
WIDEST_ON_FMA_UNITS = 64  # full fp32: a wider product's operands do not fit in registers
# The precisions that split fp32 numbers into 16-bit parts and multiply these (see tile.py). Of two with the same
# accuracy, the faster one comes first.
SPLITS = ("fp16x3", "bf16x6", "fp16x1")
SPLIT_ACCURACY = {"fp16x3": "ieee", "bf16x6": "ieee", "fp16x1": "tf32"}  # torch's setting that each of them fulfils
SPLIT_BYTES = {"fp16x3": 4, "bf16x6": 6, "fp16x1": 2}  # bytes of a number's parts
WIDEST_SPLIT = 64  # the widest layer whose products of parts fit in registers
# The narrowest layer. At this width and above, fp16x3 and bf16x6 err at most 1.5 times as much as FMA units
# (tests/test_tile_precision.py). fp16x1 has tf32's accuracy at any width.
NARROWEST_SPLIT = {"fp16x3": 32, "bf16x6": 8, "fp16x1": 1}
# The padded widths at which float32 networks were measured to be faster than torch, by architecture and precision. On
# other architectures, networks do not use SPLITS.
FP32_MEASURED: dict[int | str, dict[str, tuple[int, ...]]] = {
    90: {"fp16x3": (32, 64), "bf16x6": (64,), "fp16x1": (64,), "tf32": (64,)},
}
MOST_LAYERS, MOST_LAYERS_ON_FMA_UNITS = 16, 8  # the time to compile a kernel grows with its layers
AMD_WEIGHT_WORDS = 192  # the most words of weights a lane: AMD's compiler keeps weights in registers
# Tiles of a forward that stores nothing, by the padded width of a 16-bit network's widest layer: rows, warps, stages,
# and programs on one multiprocessor. These were the fastest on an H100 with relu and equally wide layers
# (tests/data/h100/narrow.log). At a width of 64, gelu had another one.
INFERENCE = {16: (128, 4, 3, 8), 32: (128, 8, 2, 4), 64: (128, 8, 1, 3)}
INFERENCE_SAVING_Z = {**INFERENCE, 64: (64, 4, 2, 4)}
# Tiles of products of scaled parts: rows, warps, stages, and programs on one multiprocessor. With two stages, the next
# tile of rows is loaded during this one. The times of these tiles, for 4 layers with relu and 2^20 rows (H200, Triton
# 3.6), are:
#   64 wide: inference 0.360 ms (0.198 in fp16x1), the forward that stores 0.520 ms, dgrad 0.684 ms
#   32 wide: inference 0.138 ms, the forward that stores 0.192 ms, dgrad 0.260 ms
# SCALED has the tiles for networks whose weights leave no room for these, the fastest first.
SCALED_32 = {"inference": (64, 4, 2, 4), "forward": (64, 4, 1, 4), "dgrad": (64, 4, 1, 4)}
SCALED_64 = {"inference": (64, 4, 1, 2), "forward": (64, 4, 2, 2), "dgrad": (64, 4, 2, 2)}
SCALED_ONE_PART = {"inference": (64, 4, 1, 3)}
SCALED = ((64, 4, 1, 2), (128, 8, 1, 1), (64, 4, 1, 1))
MARGIN = 2048  # bytes of shared memory that `network_shared_memory` adds to what it counts
RESERVED = 1024  # bytes of shared memory that CUDA reserves for each program
# The most columns of tensor memory, of 512, that `tensor_memory` may count for a kernel. If a kernel overflows tensor
# memory, triton 3.7 compiles it to an empty kernel without an error.
TENSOR_MEMORY = 384
# The most words that a thread may hold during a tile of the recompute kernel (see `held_words`), by the padded width of
# the widest layer.
RECOMPUTE_WORDS = {16: 80, 32: 136, 64: 84}
RECOMPUTE_WORDS_FP32 = 72
# The same for a Hopper GPU, 64 wide, with 128 rows a tile. If no z is saved, 64 -> 64 -> 64 -> 64 -> 64 (144 words)
# spills 78 words and is still faster than storing: backward and forward take 0.350 + 0.111 ms instead of 0.285 + 0.252
# (H100, 2^20 rows, Triton 3.6).
RECOMPUTE_WORDS_HOPPER = 144
RECOMPUTE_WORDS_HOPPER_Z = 108  # if a hidden layer's derivative reads z, and so may compute exponentials again
# The most words that a thread may hold in the pass over stored tensors (see `layer_groups`), by the padded width of the
# widest layer. They admit the sums of 4 layers 64 wide (80 words), or of one 128 wide (72). If a layer of 10 columns
# were in one group with 128 -> 128, the wgmma instructions would be serialised with relu, and 86 words would spill with
# gelu.
STORED_WORDS = {64: 92, 128: 80}
REBUILT_WORDS = 4  # words for each h that is rebuilt from z: with the sums of 4 layers and 4 such h, 68 words spill
REBUILT_WORDS_DROPPED = 12  # the same with Dropout: with the sums of 4 layers and 3 such h, up to 152 words spill
# Architectures on which one pass over stored tensors was measured to be faster than dgrad and wgrad: training takes
# 0.537 ms instead of 0.944 at 64 -> 64 -> 64 -> 64 -> 64, and 1.69 instead of 2.32 at 128 (H100, relu, bf16, 2^20 rows,
# Triton 3.6). On other architectures it runs only with the backend "triton".
STORED_MEASURED = (90,)
# By architecture, the padded widths at which 16-bit networks with Dropout were measured to be faster in one kernel than
# layer by layer. Others take one kernel only with the backend "triton".
DROPOUT_MEASURED: dict[int | str, tuple[int, ...]] = {}
ROWS_OF_ONES = 16  # rows of ones in the product that gives db, in tiles without columns of ones


def network_precision(
    widths: tuple[int, ...], dtype: torch.dtype, precision: str, device: Device, splits: Sequence[str] | None = None
) -> str:
    """The precision of a network's kernels (see tile.py).

    `precision` is torch's setting for fp32. On a Hopper GPU, the result is the first of `splits` (by default SPLITS)
    that has the accuracy of `precision` and that the widths allow. If there is none, or on another GPU, the result is
    `precision` itself. On other GPUs the parts of the weights do not fit: 64 -> 64 -> 64 -> 64 -> 64 by fp16x3 spills
    622 words on an A100, and needs more than a B200's tensor memory, so that Triton 3.7 compiles an empty kernel.

    64 -> 64 -> 64 -> 64 -> 64, relu, 2^20 rows, Triton 3.6, on an H200: inference 0.360 ms by fp16x3, 0.550 by bf16x6,
    1.51 in torch; training 1.86 by fp16x3 (the sum of its kernels), 2.71 by bf16x6, 4.55 in torch. On FMA units an H100
    takes 5.35 and 7.30 ms.
    """
    fits = max(map(padded, widths)) <= WIDEST_SPLIT
    if dtype == torch.float32 and fits and device.arch in FP32_MEASURED:
        for split in SPLITS if splits is None else splits:
            if SPLIT_ACCURACY[split] == precision and min(widths) >= NARROWEST_SPLIT[split]:
                return split
    return precision


def rounds_with_relu(dtype: torch.dtype, device: Device) -> bool:
    """True if the device's conversion of fp32 to `dtype` can set negative numbers to zero (PTX: cvt.rn.relu)."""
    return dtype.itemsize == 2 and isinstance(device.arch, int) and device.arch >= 80


def is_fp32_measured(pads: Sequence[int], precision: str, training: bool, device: Device) -> bool:
    """True if a float32 network's kernels were measured to be faster than torch.

    "fp16x3" and "bf16x6" were measured in inference and in training, "fp16x1" and "tf32" only in inference.
    """
    has_training = SPLIT_ACCURACY.get(precision) == "ieee"
    widths = FP32_MEASURED.get(device.arch, {}).get(precision, ())
    return max(pads) in widths and (has_training or not training)


def is_dropout_measured(pads: Sequence[int], dtype: torch.dtype, device: Device) -> bool:
    """True if a network with Dropout was measured to be faster in one kernel than layer by layer."""
    return dtype.itemsize == 2 and max(pads) in DROPOUT_MEASURED.get(device.arch, ())


@dataclass(frozen=True)
class NetworkProblem:
    """A network kernel's work, by which a tile is chosen. It does not depend on the number of rows."""

    kind: NetworkKind
    pads: tuple[int, ...]  # padded widths, from the input to the output
    saves_z: tuple[bool, ...]  # for each layer: True if backward needs its pre-activation
    dtype: torch.dtype
    precision: str = "ieee"
    input_size: int = 0  # bytes of an element of the input, if it has more than `dtype` (under autocast)
    stores: bool = False  # forward: True if it writes the tensors that a backward reads
    drops: bool = False  # True if a layer has Dropout, whose random numbers take registers

    @property
    def on_fma_units(self) -> bool:
        return self.dtype.itemsize >= 4 and self.precision == "ieee"

    @property
    def streams(self) -> bool:
        """True if the first layer's weight is streamed through the chip, because it is too wide to stay there."""
        return self.pads[0] > (WIDEST_ON_FMA_UNITS if self.on_fma_units else RESIDENT_INPUT)

    @property
    def held(self) -> list[tuple[int, int]]:
        """The weights that stay on the chip, as padded (width out, width in)."""
        shapes = list(zip(self.pads[1:], self.pads))
        return shapes[1:] if self.streams else shapes

    @property
    def widest(self) -> int:
        """The padded width of the widest tile of activations."""
        return max(self.pads[1:] if self.streams else self.pads)


def network_tile(problem: NetworkProblem, device: Device) -> TileConfig | str:
    """The tile of a network kernel, or the reason why none fits."""
    if max(problem.pads[1:]) > WIDEST_HIDDEN:
        return f"a width is over {WIDEST_HIDDEN}"
    most = MOST_LAYERS_ON_FMA_UNITS if problem.on_fma_units else MOST_LAYERS
    if len(problem.pads) - 1 > most:
        return f"there are more than {most} layers, whose kernels would take minutes to compile"
    if problem.on_fma_units and problem.widest > WIDEST_ON_FMA_UNITS:
        return f"full fp32 products wider than {WIDEST_ON_FMA_UNITS} do not fit in registers"
    if device.backend == "hip":
        words = sum(n * k for n, k in problem.held) * problem.dtype.itemsize // (4 * device.warp_size)
        if words > AMD_WEIGHT_WORDS:
            return "the weights do not fit in registers, where this compiler keeps them"
    if problem.kind == "recompute":
        return _recompute_tile(problem, device)
    if problem.kind == "stored":
        return _stored_tile(problem, device)
    if tensor_memory(problem, 64, device) > TENSOR_MEMORY:
        return "the products of all layers do not fit in tensor memory"
    for tile in (*_inference_tiles(problem, device), *_network_tiles(problem, device)):
        if network_shared_memory(problem, tile, device) <= device.shared_memory:
            return tile
    return "the weights and a tile of rows do not fit in shared memory"


def tensor_memory(problem: NetworkProblem, rows: int, device: Device) -> int:
    """The columns of Blackwell's tensor memory that the accumulators of all layers occupy; 0 on other devices."""
    if device.arch not in BLACKWELL:
        return 0
    pads = problem.pads[1:] if problem.streams else problem.pads
    return max(sum(problem.pads[1:]), sum(pads[:-1])) * rows // 128


def _inference_tiles(problem: NetworkProblem, device: Device) -> list[TileConfig]:
    """The measured tile of a forward that stores nothing, with as many programs as fit in shared memory at a time.

    The list is empty for networks without a reading. There are readings only for 16-bit dtypes on Hopper GPUs, for the
    widths in INFERENCE, and for an input as wide as the widest layer. There are none for networks that cast their input
    (under autocast) or have Dropout, which takes more registers.
    """
    if problem.kind != "forward" or problem.stores or device.arch != 90 or problem.dtype.itemsize != 2:
        return []
    measured = INFERENCE_SAVING_Z if any(problem.saves_z) else INFERENCE
    if problem.pads[0] != problem.widest or problem.widest not in measured or problem.input_size or problem.drops:
        return []
    rows, warps, stages, programs = measured[problem.widest]
    tile = TileConfig(rows, num_warps=warps, num_stages=stages)
    needed = network_shared_memory(problem, tile, device) - MARGIN + RESERVED
    fitting = max(1, (device.shared_memory + RESERVED) // needed)
    return [dataclasses.replace(tile, programs=min(programs, fitting) * device.multiprocessors)]


def _network_tiles(problem: NetworkProblem, device: Device) -> list[TileConfig]:
    """The tiles of the forward and of dgrad, the best first."""
    block_k = STREAMED_COLUMNS[problem.dtype.itemsize] if problem.streams else 0

    def tile(rows: int, warps: int, stages: int) -> TileConfig:
        programs = 16 // warps * device.multiprocessors
        return TileConfig(rows, block_k=block_k, num_warps=warps, num_stages=stages, programs=programs)

    if device.backend == "hip":
        return [tile(64, 4, 1)]
    if problem.on_fma_units:
        return [tile(64, 8, 1)]
    # On an H100, inference of 4 layers 64 wide over 2^20 rows takes 0.55 ms in bf16x6 and 0.29 ms in tf32 with these
    # tiles. With 128 rows and 8 warps it takes 0.61 and 0.41 ms.
    small = TileConfig(64, num_warps=4, programs=2 * device.multiprocessors)
    inference = problem.kind == "forward" and not problem.stores
    if problem.precision == "bf16x6":
        return [dataclasses.replace(small, precision="bf16x6")]
    if problem.precision in SPLIT_ACCURACY:
        return _scaled_tiles(problem, device)
    if problem.precision == "tf32" and inference and problem.widest == 64 and device.arch == 90:
        return [dataclasses.replace(small, num_stages=2), small]
    # Wide accumulators need tiles of few rows. Accumulators of 128 x 128 fit only if a product's operands come from
    # shared memory, and on Blackwell only a few of them fit in tensor memory.
    many = problem.widest <= 64 or (problem.widest == 128 and device.arch == 90 and problem.dtype.itemsize == 2)
    rows = 128 if many and tensor_memory(problem, 128, device) <= TENSOR_MEMORY else 64
    # With several stages, the next tile of rows is loaded during this one; in dgrad, that of every saved tensor too. In
    # layers wider than 64, Dropout's random numbers leave no registers for it: with gelu, 68 words would spill. With
    # one stage, 18 do.
    fits = not (problem.drops and problem.widest > 64)
    ahead = [3, 2] if problem.streams else [2] if (problem.kind == "forward" and fits) or problem.widest <= 32 else []
    return [tile(rows, 8, stages) for stages in (*ahead, 1)]


def _scaled_tiles(problem: NetworkProblem, device: Device) -> list[TileConfig]:
    """The tiles of products of scaled parts: the measured one, then those whose programs all fit in shared memory.

    The programs of the measured one need not all fit at a time: dgrad took 0.684 ms in two waves, and 0.943 with one
    stage, where all fit.
    """
    kind = problem.kind if problem.stores or problem.kind != "forward" else "inference"
    table = SCALED_ONE_PART if problem.precision == "fp16x1" else SCALED_32 if problem.widest <= 32 else SCALED_64
    tiles = []
    measured = (table[kind],) if kind in table else ()
    for rows, warps, stages, programs in measured + SCALED:
        tile = TileConfig(rows, num_warps=warps, num_stages=stages, precision=problem.precision)
        needed = network_shared_memory(problem, tile, device) - MARGIN + RESERVED
        if (rows, warps, stages, programs) in measured or programs * needed <= device.shared_memory + RESERVED:
            tiles.append(dataclasses.replace(tile, programs=programs * device.multiprocessors))
    return tiles


def _recompute_tile(problem: NetworkProblem, device: Device) -> TileConfig | str:
    """The tile of the recompute kernel. The sums in registers limit it. Up to 32 wide, it has few rows and few warps.

    Times on an H100, 2^20 rows, Triton 3.6, including the addition of partial sums: 32 wide 0.159 ms with 4 programs a
    multiprocessor, 0.174 with 8; 64 wide 0.350 ms with 128 rows a tile, 0.713 with 64.
    """
    if problem.streams or problem.widest > 64:
        return "the sums of a wider layer's weight gradient do not fit in registers"
    if problem.on_fma_units or SPLIT_ACCURACY.get(problem.precision) == "ieee":
        return "full fp32 products of the transposed activations do not fit in registers"
    if problem.widest == 64 and (device.arch not in DESCRIPTOR_ARCHITECTURES or problem.dtype.itemsize > 2):
        return "with this GPU and dtype, operands of 64-wide products fill the registers that weight gradients need"
    hopper = device.arch == 90
    if problem.widest == 64 and min(problem.pads) < 64 and not hopper:
        return "if some layers are 64 wide and others narrower, their weight gradients do not fit in registers"
    if problem.widest == 64 and hopper:
        # With two stages, the next tile's x and dy are loaded during this one. 16 -> 64 -> 64 -> 16 took 0.345 ms with
        # them and the transposed gradient of the first weight (fp16, 2^21 rows, H100), and 0.422 with neither (H200).
        # If x or dy is 64 wide, two stages leave no registers: it takes 0.359 ms instead of 0.350.
        stages = 2 if max(problem.pads[0], problem.pads[-1]) < 64 else 1
        tile = TileConfig(128, num_warps=8, num_stages=stages, programs=device.multiprocessors)
        limit = RECOMPUTE_WORDS_HOPPER_Z if any(problem.saves_z[:-1]) else RECOMPUTE_WORDS_HOPPER
    else:
        rows, warps = (64, 8) if problem.widest == 64 else (32, 2)
        # db is a product with columns of ones, as few as a tensor core's instruction takes.
        ones = 0 if problem.dtype.itemsize > 2 else 8 if device.backend == "cuda" and problem.widest < 64 else 16
        resident = 4 if problem.widest == 32 and hopper else 16 // warps
        tile = TileConfig(rows, ones, num_warps=warps, programs=resident * device.multiprocessors)
        limit = RECOMPUTE_WORDS[problem.widest] if problem.dtype.itemsize == 2 else RECOMPUTE_WORDS_FP32
    words = held_words(problem, tile)
    if words > limit:
        return f"the weight gradients' sums and the activations take {words} registers a thread, more than {limit}"
    return tile


def _stored_tile(problem: NetworkProblem, device: Device) -> TileConfig | str:
    """The tile of the one pass over stored tensors, whose groups of layers `layer_groups` gives."""
    # By fp16x3 one pass takes 1.41 ms layer by layer and 3.33 by pairs of layers, dgrad and wgrad 1.34 ms (64 wide, 4
    # layers, 2^20 rows, H200, Triton 3.6).
    if problem.streams or problem.widest > 128 or problem.dtype.itemsize > 2:
        return "the sums of a layer's weight gradient do not fit in registers"
    if device.arch not in DESCRIPTOR_ARCHITECTURES:
        return "on this GPU, operands of products fill the registers that weight gradients need"
    if problem.widest < 64:
        return "a wgmma instruction has 64 rows, and layers below 64 wide fill at most half of them"
    widest_sums = max(sum_words(n, k, TileConfig(64, num_warps=8)) for n, k in problem.held)
    if widest_sums > STORED_WORDS[problem.widest]:
        return "the sums of a layer's weight gradient do not fit in registers"
    # On an H100, 2^20 rows, Triton 3.6. 64 wide: 0.296 ms with 128 rows a tile and 2 stages, 0.285 with the same
    # through descriptors, 0.331 with 64 rows and 3 stages. 128 wide: 1.043 ms layer by layer, 1.147 by pairs of layers.
    forms = [(128, 2), (128, 1), (64, 1)] if problem.widest == 64 else [(64, 3), (64, 2), (64, 1)]
    for rows, stages in forms if device.arch == 90 else [(64, 1)]:
        tile = TileConfig(
            rows,
            num_warps=8,
            num_stages=stages,
            programs=device.multiprocessors,
            descriptors=problem.widest == 64,
        )
        if network_shared_memory(problem, tile, device) <= device.shared_memory:
            return tile
    return "the weights and a tile of every layer do not fit in shared memory"


def layer_groups(problem: NetworkProblem, tile: TileConfig) -> tuple[tuple[int, int], ...]:
    """The groups (low, high) of layers in the one pass over stored tensors, one for each launch, the highest first.

    A group has as many layers as possible, but their sums have to fit in registers. Every further launch would have to
    write and read another dz.
    """
    rebuilt = REBUILT_WORDS_DROPPED if problem.drops else REBUILT_WORDS
    groups = []
    high = len(problem.pads) - 1
    while high > 0:
        low, words = high, 0.0
        while low > 0:
            words += sum_words(problem.pads[low], problem.pads[low - 1], tile)
            words += rebuilt * (low > 1 and problem.saves_z[low - 2])
            if words > STORED_WORDS[problem.widest] and low < high:
                break
            low -= 1
        groups.append((low, high))
        high = low
    return tuple(groups)


def sum_words(n: int, k: int, tile: TileConfig) -> float:
    """The number of 32-bit words in which a thread holds its part of the fp32 sums of a layer's dW and db."""
    return n * (k + (tile.block_n or ROWS_OF_ONES)) / (tile.num_warps * 32)


def held_words(problem: NetworkProblem, tile: TileConfig) -> int:
    """The number of 32-bit words that a thread of the recompute kernel holds during a tile.

    They are the fp32 sums of dW and db, every layer's input, and the z of the layers whose derivative needs it. A z
    counts as wide as its layer's input, as it did when the limits were chosen.
    """
    elements = tile.num_warps * 32
    words = 0.0
    for n, k, saves_z in zip(problem.pads[1:], problem.pads, problem.saves_z):
        words += sum_words(n, k, tile) if problem.dtype.itemsize == 2 else (n * k + n) / elements
        words += tile.block_m * k * (1 + saves_z) * problem.dtype.itemsize / 4 / elements
    return round(words)


def network_shared_memory(problem: NetworkProblem, tile: TileConfig, device: Device) -> int:
    """The most bytes of shared memory for the weights, the loads in flight and conversions between layouts."""
    size = problem.dtype.itemsize
    in_registers = device.backend == "hip"
    weight_bytes = SPLIT_BYTES.get(problem.precision, size)  # of one weight, which is split once
    weights = 0 if in_registers else sum(n * k for n, k in problem.held) * weight_bytes
    staged = max(size, problem.input_size)
    rows = tile.block_m * problem.widest * staged
    if problem.streams:
        in_flight = tile.num_stages * (tile.block_m + problem.pads[1]) * tile.block_k * staged + rows
    elif problem.kind == "recompute":
        in_flight = rows * 2 * len(problem.pads)  # every layer's input and dz, as operands
    elif problem.kind == "stored":
        return max(_stored_shared_memory(problem, tile, group) for group in layer_groups(problem, tile))
    elif problem.kind == "dgrad" and tile.num_stages > 1 and problem.precision in SPLIT_ACCURACY:
        # For each stage but one: every saved tensor and dy. Once: dx.
        in_flight = rows * ((tile.num_stages - 1) * (len(problem.pads) - 1) + 1)
    elif problem.kind == "dgrad" and tile.num_stages > 1:
        in_flight = rows * (1 + tile.num_stages * len(problem.pads))
    elif tile.num_stages > 1:
        in_flight = rows * (1 + tile.num_stages)
    else:
        one_tile = device.arch in DESCRIPTOR_ARCHITECTURES and not problem.on_fma_units and not problem.drops
        in_flight = rows * (1 if one_tile else 2)
    return weights + in_flight + MARGIN


def _stored_shared_memory(problem: NetworkProblem, tile: TileConfig, group: tuple[int, int]) -> int:
    """The bytes of shared memory for a launch's weights, its tensors in flight, and its operands h and dz.

    With Dropout, the compiler takes up to two more tiles.
    """
    low, high = group
    pads = problem.pads[low : high + 1]
    weights = sum(n * k for n, k in zip(pads[1:], pads))
    operands = max((high - low - 1) * (1 + any(problem.saves_z[low : high - 1])) + 1, 2) + 2 * problem.drops
    tensors = len(pads) * max(tile.num_stages - 1, 1) + operands
    return (weights + tile.block_m * max(pads) * tensors) * problem.dtype.itemsize + 2048


def network_wgrad_tile(dtype: torch.dtype, precision: str, device: Device, rebuilds: bool = False) -> TileConfig:
    """The tile of network_wgrad. block_k is its rows at a time. The sides of dW's tiles are `Network.sides`.

    `rebuilds` is True if a layer's input is computed again with Dropout's mask. Sums 128 wide leave registers for 32
    rows of random numbers; with 64 rows, 74 words would spill.
    """
    if precision in SPLIT_ACCURACY:
        # bf16x6: 1.07 ms, 1.36 with 64 rows and 2 stages (H100, 64 wide, 2^20 rows, Triton 3.6). The scaled forms
        # compute maxima in every block of rows, so they are faster with larger blocks: fp16x3 takes 0.652 ms, 0.784
        # with 2 stages, 0.823 with 32 rows (H200).
        rows, stages = (32, 3) if precision == "bf16x6" else (64, 3)
        programs = 2 * device.multiprocessors
        return TileConfig(0, block_k=rows, num_warps=4, num_stages=stages, programs=programs, precision=precision)
    rows = 16 if dtype.itemsize >= 4 and precision == "ieee" else 32 if rebuilds else WGRAD_ROWS[dtype.itemsize]
    ahead = device.backend == "cuda" and isinstance(device.arch, int) and device.arch < 100
    return TileConfig(0, block_k=rows, num_warps=8, num_stages=3 if ahead else 2, programs=2 * device.multiprocessors)
