"""Which tile a kernel runs with: a pure function of the problem and the device."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .language import INTERPRETER

__all__ = ["DEVICES", "SUM_PARTIALS", "Device", "Problem", "TileConfig", "choose", "device_of", "device_slug"]

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
    precision: str = "ieee"  # how fp32 is multiplied: "ieee" or "tf32"


@dataclass(frozen=True)
class TileConfig:
    """How one program works: output tile block_m x block_n, block_k of the reduction at a time. 0: not used.

    `split` is how many programs share one output tile's reduction (weight gradients).
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0
    num_warps: int = 4
    num_stages: int = 1
    split: int = 1

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        sizes = {name.upper(): getattr(self, name) for name in ("block_m", "block_n", "block_k", "group_m")}
        used = {name: size for name, size in sizes.items() if size}
        return {**used, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the operands' pipeline occupies."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)
        split = f", {self.split} splits" if self.split > 1 else ""
        return f"{shape}, {self.num_warps} warps, {self.num_stages} stages{split}"


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
        """FLOP a second that the data sheet promises for products of this dtype."""
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


# The output tiles to choose from, largest first. Beyond 128 x 128, eight warps spill their accumulators (sm_80 to
# sm_100), as do four beyond 64 x 64 (triton 3.6).
OUTPUT_TILES = ((128, 128), (128, 64), (64, 64), (64, 32))

# A sum over partials reads them once, in order, and is bound by memory.
SUM_PARTIALS = TileConfig(1024, num_warps=4)


def _power_of_two(size: int, least: int, most: int) -> int:
    """The next power of two, at least `least` (a tensor core's side is 16) and at most `most`."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> TileConfig:
    """The tile for a problem on a device: the largest that still gives every multiprocessor one.

    Larger tiles read each operand fewer times; below one tile a multiprocessor, parallelism is worth more. A weight
    gradient keeps its tile and splits the rows instead, as its reduction is the long side.
    """
    if problem.kind == "output_gradient":
        block_n = _power_of_two(problem.n, 16, 128)
        return TileConfig(4096 // block_n, block_n)
    # 128 bytes of each operand at a time; half that on FMA units, where operands pass through registers.
    longest = 64 if problem.dtype.itemsize == 2 else 32 if problem.precision == "tf32" else 16
    block_k = _power_of_two(problem.k, 16, longest)
    fits = []
    for block_m, block_n in OUTPUT_TILES:
        block_m = _power_of_two(problem.m, 16, block_m)
        block_n = _power_of_two(problem.n, 16, block_n)
        tile = TileConfig(block_m, block_n, block_k, 8, 8 if block_m * block_n > 64 * 64 else 4, 2)
        if tile.shared_memory(problem.dtype.itemsize) <= device.shared_memory:
            fits.append(tile)
    if problem.kind == "wgrad":
        tile = fits[0]
        tiles = _count_tiles(problem, tile)
        # A split of fewer than 8 blocks of rows costs more to add up than it gains.
        split = max(1, min(device.multiprocessors // tiles, problem.k // (8 * block_k)))
    else:
        split = 1
        full = (tile for tile in fits if _count_tiles(problem, tile) >= device.multiprocessors)
        tile = next(full, fits[-1])
    return dataclasses.replace(tile, split=split, num_stages=_stages(tile, problem, device))


def _count_tiles(problem: Problem, tile: TileConfig) -> int:
    return -(-problem.m // tile.block_m) * -(-problem.n // tile.block_n)


def _stages(tile: TileConfig, problem: Problem, device: Device) -> int:
    """As many blocks of the reduction in flight as shared memory holds, 4 at most; AMD's pipeline takes 2."""
    if device.backend == "hip":
        return 2
    stages = device.shared_memory // dataclasses.replace(tile, num_stages=1).shared_memory(problem.dtype.itemsize)
    return max(1, min(4, stages))
