"""Tiles of the network kernels, chosen from the problem and the device alone.

The numbers are what compiles without spilling, for sm_80 to sm_100 and gfx942.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from .devices import BLACKWELL, DESCRIPTOR_ARCHITECTURES, Device
from .tile_config import TileConfig

__all__ = ["NetworkProblem", "layer_groups", "network_tile", "network_wgrad_tile", "padded"]


def padded(width: int) -> int:
    """A width as the network kernels hold it: the next power of two, at least a tensor core's side, 16."""
    return max(16, 1 << (width - 1).bit_length())


# recompute: the backward in one pass from x alone. stored: in one pass over what the forward stored. dgrad: of the pair
# dgrad and wgrad.
NetworkKind = Literal["forward", "recompute", "stored", "dgrad"]

# A program that sums weight gradients takes this many rows at a time.
WGRAD_ROWS = {2: 64, 4: 32, 8: 32}  # by bytes of an element
STREAMED_COLUMNS = {2: 64, 4: 32, 8: 32}  # of a wide first layer, at a time
RESIDENT_INPUT = 256  # the widest input whose weight is held; a wider one is streamed
WIDEST_HIDDEN = 256
WIDEST_ON_FMA_UNITS = 64  # full fp32: a wider product's operands do not fit in registers
MOST_LAYERS, MOST_LAYERS_ON_FMA_UNITS = 16, 8  # a kernel's code grows with them, and the time to compile it
AMD_WEIGHT_WORDS = 192  # a lane's share of the weights, which that compiler keeps in registers
# Tiles of a forward that stores nothing, of 16-bit layers all of this width: rows, warps, stages, and programs a
# multiprocessor. The fastest on an H100 (tests/data/h100/narrow.log), with relu; 64 wide, gelu had another.
INFERENCE = {16: (128, 4, 3, 8), 32: (128, 8, 2, 4), 64: (128, 8, 1, 3)}
INFERENCE_KEEPING_Z = {**INFERENCE, 64: (64, 4, 2, 4)}
MARGIN = 2048  # bytes of shared memory that `network_shared_memory` adds to what it counts
RESERVED = 1024  # bytes of a multiprocessor's shared memory that the system takes for each program
# Of 512 columns: with more in use, triton 3.7 compiles an empty kernel without a word.
TENSOR_MEMORY = 384
# What a thread may hold over a tile where the forward is recomputed (see `held_words`), by the widest layer filled up.
RECOMPUTE_WORDS = {16: 80, 32: 136, 64: 84}
RECOMPUTE_WORDS_FP32 = 72
# With 128 rows a tile on a Hopper, 64 wide. Where no z is kept, 64 -> 64 -> 64 -> 64 -> 64 (144 words) spills 78 words
# and is still faster than storing: 0.350 + 0.111 ms against 0.285 + 0.252 (H100, 2^20 rows, Triton 3.6).
RECOMPUTE_WORDS_HOPPER = 144
RECOMPUTE_WORDS_HOPPER_Z = 108  # where exponentials would be recomputed too
# Words that a thread may hold over stored tensors (see `layer_groups`), by the widest layer filled up: sums of 4 layers
# 64 wide, or of one 128 wide. Another layer of 10 columns beside 128 -> 128 serialises relu's wgmma and spills 86 words
# of gelu's.
STORED_WORDS = {64: 92, 128: 80}
REBUILT_WORDS = 4  # for each h that is rebuilt from z: with 4 of them beside the sums of 4 layers, 68 words spill
# Architectures where one pass over stored tensors was measured faster than dgrad and wgrad: training takes 0.537 ms
# against 0.944 at 64 -> 64 -> 64 -> 64 -> 64, 1.69 against 2.32 at 128 (H100, relu, bf16, 2^20 rows, Triton 3.6).
# Elsewhere the backend "triton" alone runs it.
STORED_MEASURED = (90,)
ROWS_OF_ONES = 16  # that db is a product with, where tiles have no columns of ones


@dataclass(frozen=True)
class NetworkProblem:
    """A network kernel's work, apart from its rows: what a tile is chosen by."""

    kind: NetworkKind
    pads: tuple[int, ...]  # widths filled up, of the input to the output
    keeps_z: tuple[bool, ...]  # of each layer: whether its pre-activation is needed besides its output
    dtype: torch.dtype
    precision: str = "ieee"
    input_size: int = 0  # bytes of an element of the input, where it is wider than what is computed in (autocast)
    stores: bool = False  # forward: whether it writes what a backward reads

    @property
    def on_fma_units(self) -> bool:
        return self.dtype.itemsize >= 4 and self.precision == "ieee"

    @property
    def streams(self) -> bool:
        """True if the first layer's weight passes by instead of being held."""
        return self.pads[0] > (WIDEST_ON_FMA_UNITS if self.on_fma_units else RESIDENT_INPUT)

    @property
    def held(self) -> list[tuple[int, int]]:
        """The weights that a program holds, (width out, width in) filled up."""
        shapes = list(zip(self.pads[1:], self.pads))
        return shapes[1:] if self.streams else shapes

    @property
    def widest(self) -> int:
        """The widest tile of activations."""
        return max(self.pads[1:] if self.streams else self.pads)


def network_tile(problem: NetworkProblem, device: Device) -> TileConfig | str:
    """The tile of a network kernel, or the reason why it has none."""
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
    """Columns of a Blackwell's tensor memory that all layers' accumulators occupy; 0 on other devices."""
    if device.arch not in BLACKWELL:
        return 0
    pads = problem.pads[1:] if problem.streams else problem.pads
    return max(sum(problem.pads[1:]), sum(pads[:-1])) * rows // 128


def _inference_tiles(problem: NetworkProblem, device: Device) -> list[TileConfig]:
    """The measured tile of a forward that stores nothing, on as many programs as have shared memory at a time.

    Networks without a reading have none: narrower inputs, and wider ones that are cast, which take more registers.
    """
    if problem.kind != "forward" or problem.stores or device.arch != 90 or problem.dtype.itemsize != 2:
        return []
    measured = INFERENCE_KEEPING_Z if any(problem.keeps_z) else INFERENCE
    if problem.pads[0] != problem.widest or problem.widest not in measured or problem.input_size:
        return []
    rows, warps, stages, programs = measured[problem.widest]
    tile = TileConfig(rows, num_warps=warps, num_stages=stages)
    needed = network_shared_memory(problem, tile, device) - MARGIN + RESERVED
    fitting = max(1, (device.shared_memory + RESERVED) // needed)
    return [dataclasses.replace(tile, programs=min(programs, fitting) * device.multiprocessors)]


def _network_tiles(problem: NetworkProblem, device: Device) -> list[TileConfig]:
    """The tiles of the forward and of the chain of dz, the best first."""
    block_k = STREAMED_COLUMNS[problem.dtype.itemsize] if problem.streams else 0

    def tile(rows: int, warps: int, stages: int) -> TileConfig:
        programs = 16 // warps * device.multiprocessors
        return TileConfig(rows, block_k=block_k, num_warps=warps, num_stages=stages, programs=programs)

    if device.backend == "hip":
        return [tile(64, 4, 1)]
    if problem.on_fma_units:
        return [tile(64, 8, 1)]
    # Small tiles of rows where accumulators are wide: 128 x 128 ones fit only where a product's operands come from
    # shared memory, and on Blackwell only a few of them fit in tensor memory.
    many = problem.widest <= 64 or (problem.widest == 128 and device.arch == 90 and problem.dtype.itemsize == 2)
    rows = 128 if many and tensor_memory(problem, 128, device) <= TENSOR_MEMORY else 64
    # The next tile of rows is loaded while this one computes. The chain of dz would so load every kept tensor.
    ahead = [3, 2] if problem.streams else [2] if problem.kind == "forward" or problem.widest <= 32 else []
    return [tile(rows, 8, stages) for stages in (*ahead, 1)]


def _recompute_tile(problem: NetworkProblem, device: Device) -> TileConfig | str:
    """Small tiles of rows and few warps up to 32 wide: the sums that a thread holds are what counts.

    On an H100, 2^20 rows, Triton 3.6, with the sums added up: 32 wide 0.159 ms with 4 programs a multiprocessor, 0.174
    with 8; 64 wide 0.350 ms with 128 rows a tile, 0.713 with 64.
    """
    if problem.streams or problem.widest > 64:
        return "the sums of a wider layer's weight gradient do not fit in registers"
    if problem.on_fma_units:
        return "full fp32 products of the transposed activations do not fit in registers"
    if problem.widest == 64 and (device.arch not in DESCRIPTOR_ARCHITECTURES or problem.dtype.itemsize > 2):
        return "the operands of 64-wide products are in registers here, where the weight gradients' sums would be"
    hopper = device.arch == 90
    if problem.widest == 64 and min(problem.pads) < 64 and not hopper:
        return "beside 64-wide layers, the sums of narrower ones do not fit in registers"
    if problem.widest == 64 and hopper:
        tile = TileConfig(128, num_warps=8, programs=device.multiprocessors)
        limit = RECOMPUTE_WORDS_HOPPER_Z if any(problem.keeps_z[:-1]) else RECOMPUTE_WORDS_HOPPER
    else:
        rows, warps = (64, 8) if problem.widest == 64 else (32, 2)
        # db is a product with the fewest columns of ones that the tensor core's instruction takes.
        ones = 0 if problem.dtype.itemsize > 2 else 8 if device.backend == "cuda" and problem.widest < 64 else 16
        resident = 4 if problem.widest == 32 and hopper else 16 // warps
        tile = TileConfig(rows, ones, num_warps=warps, programs=resident * device.multiprocessors)
        limit = RECOMPUTE_WORDS[problem.widest] if problem.dtype.itemsize == 2 else RECOMPUTE_WORDS_FP32
    words = held_words(problem, tile)
    if words > limit:
        return f"the weight gradients' sums and the activations take {words} registers a thread, more than {limit}"
    return tile


def _stored_tile(problem: NetworkProblem, device: Device) -> TileConfig | str:
    """The tile of one pass over the stored tensors, layer groups being `layer_groups`."""
    if problem.streams or problem.widest > 128 or problem.dtype.itemsize > 2:
        return "the sums of a layer's weight gradient do not fit in registers"
    if device.arch not in DESCRIPTOR_ARCHITECTURES:
        return "the products' operands are in registers here, where the weight gradients' sums would be"
    if problem.widest < 64:
        return "layers below 64 wide are half a wgmma instruction's rows"
    widest_sums = max(sum_words(n, k, TileConfig(64, num_warps=8)) for n, k in problem.held)
    if widest_sums > STORED_WORDS[problem.widest]:
        return "the sums of a layer's weight gradient do not fit in registers"
    # On an H100, 2^20 rows, Triton 3.6: 64 wide 0.296 ms with 128 rows a tile and 2 stages, 0.285 through descriptors,
    # 0.331 with 64 rows and 3 stages; 128 wide 1.043 ms layer by layer, 1.147 by pairs.
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
    """The layers (low, high) of each launch of the pass over stored tensors, the highest first.

    As many layers as have their sums fit in registers: every launch more writes and reads another dz.
    """
    groups = []
    high = len(problem.pads) - 1
    while high > 0:
        low, words = high, 0.0
        while low > 0:
            words += sum_words(problem.pads[low], problem.pads[low - 1], tile)
            words += REBUILT_WORDS * (low > 1 and problem.keeps_z[low - 2])
            if words > STORED_WORDS[problem.widest] and low < high:
                break
            low -= 1
        groups.append((low, high))
        high = low
    return tuple(groups)


def sum_words(n: int, k: int, tile: TileConfig) -> float:
    """32-bit words of the fp32 sums of a layer's dW and db that a thread holds."""
    return n * (k + (tile.block_n or ROWS_OF_ONES)) / (tile.num_warps * 32)


def held_words(problem: NetworkProblem, tile: TileConfig) -> int:
    """32-bit words a thread holds over a recomputed tile: fp32 sums of dW and db, every layer's input and kept z."""
    elements = tile.num_warps * 32
    words = 0.0
    for n, k, keeps in zip(problem.pads[1:], problem.pads, problem.keeps_z):
        words += sum_words(n, k, tile) if problem.dtype.itemsize == 2 else (n * k + n) / elements
        words += tile.block_m * k * (1 + keeps) * problem.dtype.itemsize / 4 / elements
    return round(words)


def network_shared_memory(problem: NetworkProblem, tile: TileConfig, device: Device) -> int:
    """Bytes that the weights, the loads in flight and a tile's conversions between layouts occupy at the most."""
    size = problem.dtype.itemsize
    in_registers = device.backend == "hip"
    weights = 0 if in_registers else sum(n * k for n, k in problem.held) * size
    staged = max(size, problem.input_size)
    rows = tile.block_m * problem.widest * staged
    if problem.streams:
        in_flight = tile.num_stages * (tile.block_m + problem.pads[1]) * tile.block_k * staged + rows
    elif problem.kind == "recompute":
        in_flight = rows * 2 * len(problem.pads)  # every layer's input and dz, as operands
    elif problem.kind == "stored":
        return max(_stored_shared_memory(problem, tile, group) for group in layer_groups(problem, tile))
    elif problem.kind == "dgrad" and tile.num_stages > 1:
        in_flight = rows * (1 + tile.num_stages * len(problem.pads))
    elif tile.num_stages > 1:
        in_flight = rows * (1 + tile.num_stages)
    else:
        in_flight = rows * (1 if device.arch in DESCRIPTOR_ARCHITECTURES and not problem.on_fma_units else 2)
    return weights + in_flight + MARGIN


def _stored_shared_memory(problem: NetworkProblem, tile: TileConfig, group: tuple[int, int]) -> int:
    """Bytes of a launch's weights, of the tensors in flight, and of every h that is rebuilt and dz, as operands."""
    low, high = group
    pads = problem.pads[low : high + 1]
    weights = sum(n * k for n, k in zip(pads[1:], pads))
    operands = max((high - low - 1) * (1 + any(problem.keeps_z[low : high - 1])) + 1, 2)
    tensors = len(pads) * max(tile.num_stages - 1, 1) + operands
    return (weights + tile.block_m * max(pads) * tensors) * problem.dtype.itemsize + 2048


def network_wgrad_tile(dtype: torch.dtype, precision: str, device: Device) -> TileConfig:
    """The tile of the kernel that does every dW and db from kept tensors: by rows; its sides are the weights' own."""
    rows = 16 if dtype.itemsize >= 4 and precision == "ieee" else WGRAD_ROWS[dtype.itemsize]
    ahead = device.backend == "cuda" and isinstance(device.arch, int) and device.arch < 100
    return TileConfig(0, block_k=rows, num_warps=8, num_stages=3 if ahead else 2, programs=2 * device.multiprocessors)
