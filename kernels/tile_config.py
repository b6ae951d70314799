"""`Problem` and `TileConfig`: the work of a kernel and the tile that does it, with the shared memory that it uses."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from .devices import BLACKWELL, Device

Kind = Literal["forward", "dgrad", "wgrad", "output_gradient"]


@dataclass(frozen=True)
class Problem:
    """One kernel's work: an (m, n) output, a reduction of length k (0: none), operands of one dtype.

    forward: m = rows, n = width out, k = width in. dgrad: m = rows, n = width in, k = width out. wgrad: m = width out,
    n = width in, k = rows.
    """

    kind: Kind
    m: int
    n: int
    k: int
    dtype: torch.dtype
    precision: str = "ieee"  # torch's setting for fp32: "ieee" (full fp32 accuracy) or "tf32"
    aligned: bool = True  # True if tensor descriptors can describe every tensor: all rows are 16-byte aligned
    # The name of the activation in the epilogue. forward: the layer's own; dgrad: that of the layer below; wgrad: none.
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
    """The work of one program: an output tile block_m x block_n, block_k of the reduction at a time. 0: not used.

    In the network kernels, block_m is the number of rows at a time, block_k the number of columns of a wide input at a
    time (in network_wgrad the number of rows), and block_n the number of columns of ones whose product with dz is db.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0  # this many rows of tiles are processed column by column, so that operands stay in L2
    num_warps: int = 4
    num_stages: int = 1  # blocks of the reduction in flight
    split: int = 1  # the number of programs that share one output tile's reduction (weight gradients)
    programs: int = 0  # the most programs that a persistent kernel starts; 0: one for each tile
    precision: str = "ieee"  # the way operands are multiplied: see tile.py
    descriptors: bool = False  # True if operands and results go through tensor descriptors (TMA)
    parts: int = 1  # the epilogue handles the columns in this many parts, to use less shared memory at a time
    early: bool = False  # dgrad: True if the saved tile is loaded before the products
    warp_specialize: bool = False  # True if one warp only loads

    @property
    def rows(self) -> int:
        """The number of rows that a network kernel processes at a time."""
        return self.block_m or self.block_k

    def started(self, items: int) -> int:
        """The number of programs to start for this many items of work: one for each item, but at most `programs`."""
        return min(items, self.programs or items)

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The tile's keyword arguments for a launch: block sizes, warps and stages."""
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


def is_aligned(width_in: int, width_out: int, dtype: torch.dtype) -> bool:
    """True if all rows of a layer's contiguous tensors are 16-byte aligned, as tensor descriptors require."""
    return width_in * dtype.itemsize % 16 == 0 and width_out * dtype.itemsize % 16 == 0


# Output tiles that an epilogue holds in shared memory at a time.
EPILOGUE_TILES = {"forward": 1, "dgrad": 2, "wgrad": 0}


def on_fma_units(problem: Problem, precision: str) -> bool:
    """True if products are computed on FMA units, False on tensor cores."""
    return problem.dtype.itemsize >= 4 and precision == "ieee"


def shared_memory(problem: Problem, tile: TileConfig, device: Device) -> int:
    """The most bytes of shared memory that a layer kernel uses: operands in flight, and tensors of the epilogue."""
    operands = (tile.block_m + tile.block_n) * tile.block_k
    used = tile.num_stages * operands * (2 if tile.precision == "fp16x1" else problem.dtype.itemsize)
    # Blackwell's tf32 products need operands that are contiguous along the reduction, and transpose the others.
    if tile.precision == "tf32" and device.arch in BLACKWELL:
        transposed = {"forward": 0, "dgrad": tile.block_n, "wgrad": tile.block_m + tile.block_n}[problem.kind]
        used += 2 * transposed * tile.block_k * problem.dtype.itemsize
    parts = 3 * operands * 2 if tile.precision == "bf16x6" else 0
    if not tile.descriptors:  # the epilogue reuses the pipeline's memory
        return max(used + parts, tile.block_m * tile.block_n * problem.dtype.itemsize)
    outputs = tile.block_m * tile.block_n // tile.parts * problem.dtype.itemsize * EPILOGUE_TILES[problem.kind]
    if tile.precision == "fp16x3" and problem.kind == "forward":
        outputs += outputs // 2  # a plane of h; in dgrad, planes reuse the memory of an output tile
    more = 2048 if tile.precision in ("fp16x3", "fp16x1") else 4096  # for barriers and conversions between layouts
    return used + max(parts, outputs) + more


def resident(problem: Problem, tile: TileConfig, device: Device) -> int:
    """The number of programs that a multiprocessor runs at a time, at most 2.

    It is limited by shared memory and by registers. A thread with 64 accumulators has registers left for the epilogue
    of the forward, but not for the derivative of dgrad.
    """
    sums = tile.block_m * tile.block_n // (32 * tile.num_warps)
    fits = sums <= (32 if problem.kind == "dgrad" or tile.precision == "bf16x6" else 64)
    return 2 if fits and 2 * shared_memory(problem, tile, device) <= device.shared_memory else 1


def count_tiles(problem: Problem, tile: TileConfig) -> int:
    """The number of output tiles."""
    return -(-problem.m // tile.block_m) * -(-problem.n // tile.block_n)
