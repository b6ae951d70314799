import functools
from dataclasses import dataclass
from typing import Literal

import torch

from .devices import BLACKWELL, Device

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
    """The work of one program: an output tile block_m x block_n, block_k of the reduction at a time. 0: not used.

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
        """The rows that a network kernel takes at a time."""
        return self.block_m or self.block_k

    def started(self, items: int) -> int:
        """The programs started for so many pieces of work: one each, or as many as a persistent kernel has."""
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


def is_aligned(width_in: int, width_out: int, dtype: torch.dtype) -> bool:
    """True if tensor descriptors can describe a layer's tensors where these are contiguous: rows begin at 16 bytes."""
    return width_in * dtype.itemsize % 16 == 0 and width_out * dtype.itemsize % 16 == 0


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
