"""Which tile a kernel runs with: a pure function of the problem and the device."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .language import INTERPRETER, TRITON_VERSION

__all__ = [
    "DEVICES",
    "SUM_PARTIALS",
    "Device",
    "NetworkProblem",
    "Problem",
    "TileConfig",
    "candidates",
    "choose",
    "device_of",
    "device_slug",
    "network_tile",
    "network_wgrad_tile",
    "padded",
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

    @property
    def rows(self) -> int:
        """Of the batch."""
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
    precision: str = "ieee"  # how operands are multiplied: see dot.py
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
        """FLOP a second that the data sheet promises for products of this dtype, multiplied so (see dot.py)."""
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


def _power_of_two(size: int, least: int, most: int) -> int:
    """The next power of two, at least `least` (a tensor core's side is 16) and at most `most`."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


# --- Tiles of the layer kernels. What is left out is what spills (tests/compile_kernels.py). ---

# Output tiles, the larger ones first; those with a side of 256 only through descriptors.
OUTPUT_TILES = (
    (256, 128), (128, 256), (128, 128), (64, 256), (128, 64), (64, 128), (64, 64), (64, 32),
    (32, 128), (32, 64), (32, 32), (16, 128), (16, 64), (16, 32),
)  # fmt: skip
LONGEST_SIDE = 128  # of all others
LONGEST_UNALIGNED = 64
BLACKWELL = (100, 103)
# bf16x6 holds three 16-bit parts of each operand besides; on Blackwell, products beyond this overflow tensor memory.
LARGEST_SPLIT: dict[int | str, int] = {80: 128 * 64, 90: 128 * 128, 100: 128 * 64, 103: 128 * 64}
DESCRIPTOR_ARCHITECTURES = (90, 100, 103)
WAITING_WORDS = 32  # what a thread may hold of a saved tile over dgrad's products
# The shortest reduction for which bf16x6 is no less accurate than torch's own fp32 (tests/test_precision.py).
SHORTEST_SPLIT = 64
BLOCK_K = {"bf16x6": 32, "tf32": 32, "ieee": 16}  # of fp32; 16-bit operands: 64
EPILOGUE_TILES = {"forward": 1, "dgrad": 2, "wgrad": 0}  # of an output tile's size, in shared memory at a time

# The estimate behind the rule: rates of one multiprocessor. What no data sheet tells is set by experience, unmeasured.
L2_RATE = 70e9  # bytes a second that operands arrive at
REACHED = {"tensor": 0.8, "mma.sync": 0.5, "bf16x6": 0.6, "fma": 0.7}  # part of the peak that products reach
SPLIT_RATE = 21e9  # operands a second that are split into parts
EPILOGUE_SECONDS = 2e-6  # filling the pipeline and ending a tile, where nothing else runs meanwhile
SPLIT_SECONDS = 4e-6  # of launching the sum over partials


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> TileConfig:
    """The tile for a problem on a device, from these two alone: the one with the least estimated time."""
    return candidates(problem, device)[0]


@functools.lru_cache(maxsize=4096)
def candidates(problem: Problem, device: Device) -> tuple[TileConfig, ...]:
    """The tiles that run a problem, by estimated time, the least first: what is worth measuring."""
    if problem.kind == "output_gradient":
        block_n = _power_of_two(problem.n, 16, 128)
        return (TileConfig(4096 // block_n, block_n),)
    found = [
        tile
        for precision in _precisions(problem, device)
        for sides in OUTPUT_TILES
        for tile in _tiles(problem, device, precision, *sides)
    ]
    found.sort(key=lambda tile: _seconds(problem, tile, device))
    return tuple(dict.fromkeys([*found, *_specialized(problem, device, found)]))


def _specialized(problem: Problem, device: Device, tiles: Sequence[TileConfig]) -> list[TileConfig]:
    """Tiles to measure that the rule never chooses: with a warp that only loads, which Triton documents for Blackwell
    alone, and compiles as meant here on Hopper, with four warps.
    """
    wanted = problem.kind in ("forward", "dgrad") and problem.dtype.itemsize == 2
    if device.arch != 90 or not wanted or TRITON_VERSION < (3, 7):  # whose compiler fails at them
        return []
    return [
        dataclasses.replace(tile, num_warps=4, num_stages=3, parts=4, early=False, warp_specialize=True)
        for tile in tiles
        if tile.descriptors and tile.block_m == tile.block_n == 128
    ]


def _precisions(problem: Problem, device: Device) -> tuple[str, ...]:
    if problem.dtype != torch.float32 or problem.precision == "tf32":
        return (problem.precision,) if problem.dtype == torch.float32 else ("ieee",)
    splits = device.arch in LARGEST_SPLIT and problem.k >= SHORTEST_SPLIT
    return ("bf16x6", "ieee") if splits else ("ieee",)


def _tiles(problem: Problem, device: Device, precision: str, block_m: int, block_n: int) -> Iterator[TileConfig]:
    """The tiles with such an output, if they fit."""
    on_fma_units = _on_fma_units(problem, precision)
    descriptors = problem.aligned and device.arch in DESCRIPTOR_ARCHITECTURES and not on_fma_units
    splits = precision == "bf16x6"
    # Of the tiles with a long side, Blackwell's take 16-bit operands, and no fewer than 128 rows.
    spills = device.arch in BLACKWELL and (problem.dtype.itemsize > 2 or block_m == 64)
    if max(block_m, block_n) > LONGEST_SIDE and (splits or not descriptors or spills):
        return
    if splits and block_m * block_n > LARGEST_SPLIT[device.arch]:
        return
    sides = block_m, block_n
    block_m, block_n = _power_of_two(problem.m, 16, block_m), _power_of_two(problem.n, 16, block_n)
    longest = 64 if problem.dtype.itemsize == 2 else BLOCK_K[precision]
    if max(sides) > LONGEST_SIDE and ((block_m, block_n) != sides or problem.k < longest):
        return  # what is left of it is one of the others
    if not problem.aligned and not on_fma_units:  # loads of single elements, each with a pointer of its own
        longest //= 2
        if max(block_m, block_n) > LONGEST_UNALIGNED:
            return
    wgmma_alone = descriptors and not splits  # operands come from shared memory: four warps hold larger products
    eight = block_m * block_n >= 128 * 128 and block_m > 64 if wgmma_alone else block_m * block_n > 64 * 64
    tile = TileConfig(
        block_m,
        block_n,
        _power_of_two(problem.k, 16, longest),
        group_m=8,
        num_warps=8 if eight else 4,
        precision=precision,
        descriptors=descriptors,
    )
    for stages, parts in _depths(problem, device, tile):
        deep = dataclasses.replace(tile, num_stages=stages, parts=parts)
        if descriptors:
            waiting = block_m * block_n * problem.dtype.itemsize // (4 * 32 * tile.num_warps)
            early = problem.kind == "dgrad" and device.arch == 90 and not splits and waiting <= WAITING_WORDS
            deep = dataclasses.replace(deep, early=early)
            programs = device.multiprocessors * _resident(problem, deep, device)
            deep = dataclasses.replace(deep, programs=programs)
        yield deep
        if problem.kind == "wgrad":
            # A split of fewer than 8 blocks of rows costs more to add up than it gains.
            room = device.multiprocessors * _resident(problem, deep, device) // _count_tiles(problem, deep)
            split = min(room, problem.k // (8 * deep.block_k))
            if split > 1:
                yield dataclasses.replace(deep, split=split)


def _depths(problem: Problem, device: Device, tile: TileConfig) -> Iterator[tuple[int, int]]:
    """(stages, parts): the deepest pipeline that fits; and the one with which two programs fit beside each other."""
    if device.backend == "hip":  # that pipeline takes two
        yield 2, 1
        return
    parts = [1]
    if problem.kind != "wgrad" and tile.descriptors:
        # Beside many sums of a thread, or what was saved, only so many elements go through an activation at a time.
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


def _on_fma_units(problem: Problem, precision: str) -> bool:
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


def _resident(problem: Problem, tile: TileConfig, device: Device) -> int:
    """How many programs a multiprocessor runs at a time, 2 at the most: by shared memory, and sums in registers.

    Beside 64 sums a thread there is room for an epilogue, but not for a derivative's.
    """
    sums = tile.block_m * tile.block_n // (32 * tile.num_warps)
    fits = sums <= (32 if problem.kind == "dgrad" or tile.precision == "bf16x6" else 64)
    return 2 if fits and 2 * shared_memory(problem, tile, device) <= device.shared_memory else 1


def _count_tiles(problem: Problem, tile: TileConfig) -> int:
    return -(-problem.m // tile.block_m) * -(-problem.n // tile.block_n)


def _rate(device: Device, dtype: torch.dtype, precision: str) -> float:
    """FLOP a second of one multiprocessor at its peak; of an unknown device as of one of its architecture."""
    for known in (device, *DEVICES.values()):
        peak = known.peak(dtype, precision)
        if peak and known.arch == device.arch:
            return peak / known.multiprocessors
    return 1e12


def _seconds(problem: Problem, tile: TileConfig, device: Device) -> float:
    """Estimated time: the multiprocessor with most tiles, each by its products or its operands' way from L2."""
    items = _count_tiles(problem, tile) * tile.split
    length = -(-problem.k // tile.split // tile.block_k) * tile.block_k
    wide = tile.block_m >= 64 or device.arch not in DESCRIPTOR_ARCHITECTURES
    kind = "tensor" if wide else "mma.sync"
    kind = "fma" if _on_fma_units(problem, tile.precision) else "bf16x6" if tile.precision == "bf16x6" else kind
    rate = _rate(device, problem.dtype, tile.precision) * REACHED[kind]
    compute = 2 * tile.block_m * tile.block_n * length / rate
    operands = (tile.block_m + tile.block_n) * length
    compute += operands / SPLIT_RATE if kind == "bf16x6" else 0
    traffic = operands * problem.dtype.itemsize / L2_RATE
    deepest = -(-items // device.multiprocessors)
    turns = -(-deepest // _resident(problem, tile, device))  # programs side by side hide each other's epilogues
    seconds = deepest * max(compute, traffic) + turns * EPILOGUE_SECONDS
    if tile.split > 1:
        moved = 2 * 4 * tile.split * problem.m * problem.n
        seconds += SPLIT_SECONDS + moved / (device.bandwidth or 1e12)
    return seconds


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
