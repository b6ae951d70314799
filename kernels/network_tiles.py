"""Problems, tiles and devices; and the tiles of the network kernels, chosen from the problem and the device alone."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .language import INTERPRETER

__all__ = [
    "DEVICES",
    "SUM_PARTIALS",
    "Device",
    "NetworkProblem",
    "Problem",
    "TileConfig",
    "count_tiles",
    "device_of",
    "device_slug",
    "is_aligned",
    "network_tile",
    "network_wgrad_tile",
    "on_fma_units",
    "padded",
    "resident",
    "shared_memory",
]

Kind = Literal["forward", "dgrad", "wgrad", "output_gradient"]


@dataclass(frozen=True)
class Problem:
    """One kernel's work: an (m, n) output, a reduction of length k (0: none), operands of one dtype.

    Forward: m rows, n = width out, k = width in. dgrad: n = width in, k = width out. wgrad: m = width out, n = width
    in, k rows.
    """

    kind: Kind
    m: int
    n: int
    k: int
    dtype: torch.dtype
    precision: str = "ieee"  # torch's setting for fp32: "ieee" (full fp32 accuracy) or "tf32"
    aligned: bool = True  # whether tensor descriptors can describe every tensor: rows that begin at 16 bytes
    # The activation in the epilogue, by name. forward: the layer's own; dgrad: the one below; wgrad has none.
    activation: str = "identity"

    @property
    def rows(self) -> int:
        """The batch size."""
        return self.k if self.kind == "wgrad" else self.m

    @property
    def widths(self) -> tuple[int, int]:
        """(width out, width in) of the layer."""
        return {"forward": (self.n, self.k), "dgrad": (self.k, self.n)}.get(self.kind, (self.m, self.n))


@dataclass(frozen=True)
class TileConfig:
    """How one program works: output tile block_m x block_n, block_k of the reduction at a time. 0: not used.

    In the kernels of whole networks block_m is rows, block_k the columns of a wide input at a time (of the weight
    gradients: rows), block_n the columns of ones that sum db.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0  # rows of tiles that are gone through column by column, for L2
    num_warps: int = 4
    num_stages: int = 1  # blocks of the reduction in flight
    split: int = 1  # how many programs share one output tile's reduction (weight gradients)
    programs: int = 0  # of a persistent kernel: how many are started at the most; 0: one a tile
    precision: str = "ieee"  # how operands are multiplied: see tile.py
    descriptors: bool = False  # whether operands and results go through tensor descriptors (TMA)
    parts: int = 1  # the epilogue goes through the columns in so many pieces, each with less shared memory
    early: bool = False  # dgrad: whether the saved tile is asked for before the products
    warp_specialize: bool = False  # whether a warp of its own loads

    @property
    def rows(self) -> int:
        """Of a network kernel: how many it takes at a time."""
        return self.block_m or self.block_k

    def started(self, items: int) -> int:
        """How many programs are started for so many pieces of work: one each, or as many as a persistent kernel has."""
        return min(items, self.programs or items)

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        sizes = {name.upper(): getattr(self, name) for name in ("block_m", "block_n", "block_k", "group_m")}
        used = {name: size for name, size in sizes.items() if size}
        return {**used, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        words = ["x".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)]
        words += [f"{self.num_warps} warps", f"{self.num_stages} stages"]
        words += [self.precision] if self.precision != "ieee" else []
        words += ["descriptors"] if self.descriptors else []
        words += [f"{self.parts} parts"] if self.parts > 1 else []
        words += [name.replace("_", " ") for name in ("early", "warp_specialize") if getattr(self, name)]
        words += [f"{self.split} splits"] if self.split > 1 else []
        return ", ".join(words)


@dataclass(frozen=True)
class Device:
    """What the choice of a tile, and a floor on a time, depend on."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # as triton's GPUTarget has it: 90, "gfx942"
    multiprocessors: int
    shared_memory: int  # bytes a program may use
    warp_size: int = 32
    bandwidth: float | None = None  # bytes a second, from the data sheet; None where unknown
    tensor_16: float | None = None  # FLOP a second, dense, 16-bit operands
    tensor_tf32: float | None = None
    fma_32: float | None = None

    def peak(self, dtype: torch.dtype, precision: str = "ieee") -> float | None:
        """FLOP a second that the data sheet promises for products of this dtype, multiplied so (see tile.py)."""
        if precision == "bf16x6":
            return self.tensor_16 / 6 if self.tensor_16 else None
        if dtype == torch.float32:
            return self.tensor_tf32 if precision == "tf32" else self.fma_32
        return self.tensor_16 if dtype in (torch.float16, torch.bfloat16) else None


# Data sheets: NVIDIA's for A100 SXM, H100 SXM, H200 SXM and B200, AMD's for MI300X; dense rates, without sparsity.
DEVICES = {
    device.name: device
    for device in (
        Device("NVIDIA A100", "cuda", 80, 108, 166912, 32, 2.039e12, 312e12, 156e12, 19.5e12),
        Device("NVIDIA H100", "cuda", 90, 132, 232448, 32, 3.35e12, 989e12, 494e12, 67e12),
        Device("NVIDIA H200", "cuda", 90, 132, 232448, 32, 4.8e12, 989e12, 494e12, 67e12),
        Device("NVIDIA B200", "cuda", 100, 148, 232448, 32, 8e12, 2250e12, 1100e12, 75e12),
        Device("AMD MI300X", "hip", "gfx942", 304, 65536, 64, 5.3e12, 1307e12, 654e12, 163e12),
    )
}

# The interpreter takes the tiles of a small Hopper, so that the same rules are exercised.
INTERPRETED_DEVICE = Device("Triton's interpreter", "cuda", 90, 4, 232448)


def device_slug(name: str) -> str:
    """The file name of a device's results and tiles: its name in lower case, other characters as "_".

    "NVIDIA H200" is nvidia_h200; "NVIDIA A100-SXM4-80GB" is nvidia_a100_sxm4_80gb.
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def device_of(tensor: Tensor) -> Device:
    """The device a tensor is on; the interpreter's for a CPU tensor."""
    return describe(tensor.device.type, tensor.device.index or 0)


@functools.lru_cache(maxsize=64)
def describe(kind: str, index: int = 0) -> Device:
    """What a torch device is, by its kind and index."""
    if kind == "cpu" or INTERPRETER:
        return INTERPRETED_DEVICE
    properties: Any = torch.cuda.get_device_properties(index)
    known = next((device for name, device in DEVICES.items() if name in properties.name), INTERPRETED_DEVICE)
    hip = torch.version.hip is not None
    return Device(
        properties.name,
        "hip" if hip else "cuda",
        properties.gcnArchName.split(":")[0] if hip else properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        65536 if hip else properties.shared_memory_per_block_optin,
        64 if hip else 32,
        known.bandwidth,
        known.tensor_16,
        known.tensor_tf32,
        known.fma_32,
    )


# A sum over partials is bound by memory, and by latency where one row follows the other: 32 rows at a time.
SUM_PARTIALS = TileConfig(64, block_k=32, num_warps=4)


def padded(width: int) -> int:
    """A width as the network kernels hold it: the next power of two, at least a tensor core's side, 16."""
    return max(16, 1 << (width - 1).bit_length())


def is_aligned(width_in: int, width_out: int, dtype: torch.dtype) -> bool:
    """True if tensor descriptors can describe a layer's tensors where these are contiguous: rows begin at 16 bytes."""
    return width_in * dtype.itemsize % 16 == 0 and width_out * dtype.itemsize % 16 == 0


# --- A tile of the layer kernels on a device ---

BLACKWELL = (100, 103)
DESCRIPTOR_ARCHITECTURES = (90, 100, 103)
EPILOGUE_TILES = {"forward": 1, "dgrad": 2, "wgrad": 0}  # of an output tile's size, in shared memory at a time


def on_fma_units(problem: Problem, precision: str) -> bool:
    """True if products are computed on FMA units, False on tensor cores."""
    return problem.dtype.itemsize >= 4 and precision == "ieee"


def shared_memory(problem: Problem, tile: TileConfig, device: Device) -> int:
    """Bytes of a layer kernel's shared memory at the most: operands in flight, and the tensors of its epilogue."""
    operands = (tile.block_m + tile.block_n) * tile.block_k
    used = tile.num_stages * operands * problem.dtype.itemsize
    if tile.precision == "tf32" and device.arch in BLACKWELL:  # which turns operands that lie across the reduction
        turned = {"forward": 0, "dgrad": tile.block_n, "wgrad": tile.block_m + tile.block_n}[problem.kind]
        used += 2 * turned * tile.block_k * problem.dtype.itemsize
    parts = 3 * operands * 2 if tile.precision == "bf16x6" else 0
    if not tile.descriptors:  # the pipeline's memory is the epilogue's after it
        return max(used + parts, tile.block_m * tile.block_n * problem.dtype.itemsize)
    outputs = tile.block_m * tile.block_n // tile.parts * problem.dtype.itemsize * EPILOGUE_TILES[problem.kind]
    return used + max(parts, outputs) + 4096  # barriers, and what is turned on its way


def resident(problem: Problem, tile: TileConfig, device: Device) -> int:
    """The programs that a multiprocessor runs at a time, at most 2: by shared memory, and by the sums in registers.

    Beside 64 sums a thread there is room for an epilogue, but not for a derivative's.
    """
    sums = tile.block_m * tile.block_n // (32 * tile.num_warps)
    fits = sums <= (32 if problem.kind == "dgrad" or tile.precision == "bf16x6" else 64)
    return 2 if fits and 2 * shared_memory(problem, tile, device) <= device.shared_memory else 1


def count_tiles(problem: Problem, tile: TileConfig) -> int:
    """The number of output tiles."""
    return -(-problem.m // tile.block_m) * -(-problem.n // tile.block_n)


# --- Tiles of the network kernels. The numbers are what compiles without spilling, for sm_80 to sm_100 and gfx942. ---

NetworkKind = Literal["forward", "recompute", "dgrad"]

# A program that sums weight gradients takes this many rows at a time.
WGRAD_ROWS = {2: 64, 4: 32, 8: 32}  # by bytes of an element
STREAMED_COLUMNS = {2: 64, 4: 32, 8: 32}  # of a wide first layer, at a time
RESIDENT_INPUT = 256  # the widest input whose weight is held; a wider one is streamed
WIDEST_HIDDEN = 256
WIDEST_ON_FMA_UNITS = 64  # full fp32: a wider product's operands do not fit in registers
MOST_LAYERS, MOST_LAYERS_ON_FMA_UNITS = 16, 8  # a kernel's code grows with them, and the time to compile it
AMD_WEIGHT_WORDS = 192  # a lane's share of the weights, which that compiler keeps in registers
# Of 512 columns: with more in use, triton 3.7 compiles an empty kernel without a word.
TENSOR_MEMORY = 384
# What a thread may hold over a tile where the forward is recomputed (see `held_words`), by the widest layer filled up.
RECOMPUTE_WORDS = {16: 80, 32: 136, 64: 84}
RECOMPUTE_WORDS_FP32 = 72


@dataclass(frozen=True)
class NetworkProblem:
    """A network kernel's work, apart from its rows: what a tile is chosen by."""

    kind: NetworkKind
    pads: tuple[int, ...]  # widths filled up, of the input to the output
    keeps_z: tuple[bool, ...]  # of each layer: whether its pre-activation is needed besides its output
    dtype: torch.dtype
    precision: str = "ieee"
    input_size: int = 0  # bytes of an element of the input, where it is wider than what is computed in (autocast)

    @property
    def on_fma_units(self) -> bool:
        return self.dtype.itemsize >= 4 and self.precision == "ieee"

    @property
    def streams(self) -> bool:
        """Whether the first layer's weight passes by instead of being held."""
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
    if tensor_memory(problem, 64, device) > TENSOR_MEMORY:
        return "the products of all layers do not fit in tensor memory"
    for tile in _network_tiles(problem, device):
        if network_shared_memory(problem, tile, device) <= device.shared_memory:
            return tile
    return "the weights and a tile of rows do not fit in shared memory"


def tensor_memory(problem: NetworkProblem, rows: int, device: Device) -> int:
    """Columns of a Blackwell's tensor memory that all layers' accumulators occupy; 0 on other devices."""
    if device.arch not in BLACKWELL:
        return 0
    pads = problem.pads[1:] if problem.streams else problem.pads
    return max(sum(problem.pads[1:]), sum(pads[:-1])) * rows // 128


def _network_tiles(problem: NetworkProblem, device: Device) -> list[TileConfig]:
    """What the forward and the chain of dz run with, the best first."""
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
    """Small tiles of rows, few warps: the sums that a thread holds are what counts."""
    if problem.streams or problem.widest > 64:
        return "the sums of a wider layer's weight gradient do not fit in registers"
    if problem.on_fma_units:
        return "full fp32 products of the transposed activations do not fit in registers"
    rows, warps = (64, 8) if problem.widest == 64 else (32, 2)
    # db is a product with the fewest columns of ones that the tensor core's instruction takes; with one, a plain sum.
    ones = 1 if problem.dtype.itemsize > 2 else 8 if device.backend == "cuda" and problem.widest < 64 else 16
    tile = TileConfig(rows, ones, num_warps=warps, programs=16 // warps * device.multiprocessors)
    if problem.widest == 64 and (device.arch not in DESCRIPTOR_ARCHITECTURES or problem.dtype.itemsize > 2):
        return "the operands of 64-wide products are in registers here, where the weight gradients' sums would be"
    if problem.widest == 64 and min(problem.pads) < 64:
        return "beside 64-wide layers, the sums of narrower ones do not fit in registers"
    limit = RECOMPUTE_WORDS[problem.widest] if problem.dtype.itemsize == 2 else RECOMPUTE_WORDS_FP32
    words = held_words(problem, tile)
    if words > limit:
        return f"the weight gradients' sums and the activations take {words} registers a thread, more than {limit}"
    return tile


def held_words(problem: NetworkProblem, tile: TileConfig) -> int:
    """32-bit words a thread holds over a recomputed tile: fp32 sums of dW and db, every layer's input and kept z."""
    elements = tile.num_warps * 32
    words = 0.0
    for n, k, keeps in zip(problem.pads[1:], problem.pads, problem.keeps_z):
        words += (n * k + n * tile.block_n) / elements
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
    elif problem.kind == "dgrad" and tile.num_stages > 1:
        in_flight = rows * (1 + tile.num_stages * len(problem.pads))
    elif tile.num_stages > 1:
        in_flight = rows * (1 + tile.num_stages)
    else:
        in_flight = rows * (1 if device.arch in DESCRIPTOR_ARCHITECTURES and not problem.on_fma_units else 2)
    return weights + in_flight + 2048


def network_wgrad_tile(dtype: torch.dtype, precision: str, device: Device) -> TileConfig:
    """The tile of the kernel that does every dW and db from kept tensors: by rows; its sides are the weights' own."""
    rows = 16 if dtype.itemsize >= 4 and precision == "ieee" else WGRAD_ROWS[dtype.itemsize]
    ahead = device.backend == "cuda" and isinstance(device.arch, int) and device.arch < 100
    return TileConfig(0, block_k=rows, num_warps=8, num_stages=3 if ahead else 2, programs=2 * device.multiprocessors)
