"""Estimated seconds of a product, by one of our tiles and by torch with its pointwise passes.

    seconds = Σ rate · term

A term is the time of one part of the work at the rates of the GPU's data sheet: bytes over bandwidth, FLOPs over peak,
launches. Its rate is a factor, the measured time of that part over the data sheet's, fitted to readings (rates.json,
written by `python -m bench.fit`). So the readings of one GPU serve for others, through their data sheets. There are
rates for 16-bit and for 32-bit products. A term whose name begins with a kind (forward, dgrad, wgrad) is for that kind
alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .activations import ACTIVATIONS
from .devices import DESCRIPTOR_ARCHITECTURES, DEVICES, Device
from .tile_config import Problem, TileConfig, count_tiles, on_fma_units, resident

__all__ = [
    "RATES",
    "RATES_FILE",
    "Rates",
    "kernel_seconds",
    "kernel_terms",
    "operand_bits",
    "torch_seconds",
    "torch_terms",
]


@dataclass(frozen=True, eq=False)
class Rates:
    """Fitted factors, by the bits of a product's operands ("16" or "32"), then by the name of the term."""

    kernel: Mapping[str, Mapping[str, float]]
    torch: Mapping[str, Mapping[str, float]]


RATES_FILE = Path(__file__).parent / "rates.json"
RATES = Rates(**json.loads(RATES_FILE.read_text())["rates"])

# Unit times, in seconds, for the terms that have no rate on a data sheet.
LAUNCH = 5e-6  # one launch
SUM_LAUNCH = 4e-6  # the launch that adds partial sums, right after the products
BLOCK = 1e-7  # waiting for one block of a reduction
TILE = 1e-6  # filling the pipeline for a tile, and ending it
STEP = 1e-9  # one step of a reduction in torch's product
SPLIT = 1 / 21e9  # splitting one element of an operand into three parts
# Other assumptions.
FUNCTION_FLOPS = 100  # FLOPs of an activation for one element
TILE_SIDE = 128  # the assumed side of the tiles in torch's library
MOST_IDLE = 30.0  # limit of the term "idle": idle multiprocessors over busy ones, in a product of few tiles
THIN = 16  # if its output is at most this wide, torch's product takes longer than the transfer of its bytes


@dataclass(frozen=True)
class _Sheet:
    """The rates on a data sheet, for the whole device."""

    bandwidth: float
    fma: float
    tensor_16: float
    tensor_tf32: float

    def peak(self, problem: Problem) -> float:
        if problem.dtype.itemsize == 2:
            return self.tensor_16
        return self.tensor_tf32 if problem.precision == "tf32" else self.fma


@functools.lru_cache(maxsize=64)
def _data_sheet(device: Device) -> _Sheet:
    """The device's rates. Unknown ones are scaled by multiprocessors from a known device.

    The known device is one of the same architecture; an H100 if there is none.
    """
    alike = next((known for known in DEVICES.values() if known.arch == device.arch), DEVICES["NVIDIA H100"])
    share = device.multiprocessors / alike.multiprocessors

    def rate(name: str) -> float:
        own, other = getattr(device, name), getattr(alike, name)
        return float(own or other * share)

    return _Sheet(rate("bandwidth"), rate("fma_32"), rate("tensor_16"), rate("tensor_tf32"))


@dataclass(frozen=True)
class _Tensors:
    """The numbers of elements in the tensors of a product."""

    operands: int
    output: int
    saved: int  # the saved tensor, read or written by our epilogue, and h where dgrad computes it again
    pointwise: int  # all that torch's pointwise passes read and write after the product


def _tensors(problem: Problem) -> _Tensors:
    activation = ACTIVATIONS.get(problem.activation, ACTIVATIONS["identity"])
    active, saves_z = activation.name != "identity", activation.saves_preactivation
    output = problem.m * problem.n
    if problem.kind == "forward":
        saved = output * (active and saves_z)  # z
        pointwise = 2 * output * (active and activation.name != "relu")  # relu is in torch's own epilogue
    elif problem.kind == "dgrad":
        saved = output * (active + (active and saves_z))  # the saved tensor is read; h is written again
        pointwise = output * (3 * active + (active and saves_z))
    else:
        saved, pointwise = 0, problem.m * problem.k  # torch reads dz again to sum db
    return _Tensors((problem.m + problem.n) * problem.k, output, saved, pointwise)


def operand_bits(problem: Problem) -> str:
    """The key of a product's rates in `Rates`: "16" or "32"."""
    return "16" if problem.dtype.itemsize == 2 else "32"


def kernel_terms(problem: Problem, tile: TileConfig, device: Device) -> dict[str, float]:
    """Seconds of each part of a kernel's work at the data sheet's rates.

    Terms of launches and memory count the whole device, the others its busiest multiprocessor.
    """
    sheet, tensors, size = _data_sheet(device), _tensors(problem), problem.dtype.itemsize
    share = 1 / device.multiprocessors
    length = -(-problem.k // tile.split // tile.block_k) * tile.block_k
    tiles = -(-count_tiles(problem, tile) * tile.split // device.multiprocessors)  # on the busiest multiprocessor
    waves = -(-tiles // resident(problem, tile, device))  # resident programs hide each other's epilogues
    elements = tiles * tile.block_m * tile.block_n
    operands = tiles * (tile.block_m + tile.block_n) * length
    unit, peak = _unit(problem, tile, device, sheet)
    kind = problem.kind
    terms = {
        f"{kind} launch": LAUNCH,
        f"{kind} memory": (tensors.operands + tensors.output + tensors.saved) * size / sheet.bandwidth,
        "L2": operands * size / (sheet.bandwidth * share),
        "block": waves * (length // tile.block_k) * BLOCK,
        "tile": waves * TILE,
        unit: 2 * elements * length / (peak * share),
    }
    if tile.precision == "bf16x6":
        terms["splitting"] = operands * SPLIT
    if problem.activation != "identity":
        activation = ACTIVATIONS.get(problem.activation)
        cheap = activation is not None and activation.piecewise
        terms[f"{kind} {'piecewise' if cheap else 'transcendental'}"] = elements * FUNCTION_FLOPS / (sheet.fma * share)
    if not problem.aligned:
        terms[f"{kind} unaligned"] = operands * size / (sheet.bandwidth * share)
    if tile.split > 1:
        terms["sum launch"] = SUM_LAUNCH
        terms["partial sums"] = 2 * 4 * tile.split * tensors.output / sheet.bandwidth
    return terms


def _unit(problem: Problem, tile: TileConfig, device: Device, sheet: _Sheet) -> tuple[str, float]:
    """The name of the hardware unit that multiplies, and its peak rate."""
    if on_fma_units(problem, tile.precision):
        return "FMA", sheet.fma
    if tile.precision == "bf16x6":
        return "bf16x6", sheet.tensor_16 / 6
    wide = tile.block_m >= 64 or device.arch not in DESCRIPTOR_ARCHITECTURES
    return "tensor cores" if wide else "mma.sync", sheet.peak(problem)


def torch_terms(problem: Problem, device: Device) -> dict[str, float]:
    """Seconds of each part of torch's product, and of the pointwise passes after it, at the data sheet's rates."""
    sheet, tensors, size = _data_sheet(device), _tensors(problem), problem.dtype.itemsize
    kind = problem.kind
    product = 2 * problem.m * problem.n * problem.k / sheet.peak(problem)
    memory = (tensors.operands + tensors.output) * size / sheet.bandwidth
    tiles = -(-problem.m // TILE_SIDE) * -(-problem.n // TILE_SIDE)
    idle = -(-tiles // device.multiprocessors) * device.multiprocessors / tiles - 1
    terms = {
        f"{kind} launch": LAUNCH,
        "product": product,
        "idle": product * min(idle, MOST_IDLE),
        "memory": memory,
    }
    if kind != "wgrad":  # torch's library splits the long reductions of wgrad
        terms[f"{kind} length"] = problem.k * STEP
    if tensors.pointwise:
        terms[f"{kind} pointwise"] = tensors.pointwise * size / sheet.bandwidth
        if kind != "wgrad":
            terms["pointwise launch"] = LAUNCH
    if not problem.aligned:
        terms["unaligned memory"], terms["unaligned product"] = memory, product
    if min(problem.n, problem.m if kind == "wgrad" else problem.n) <= THIN:
        terms["thin"] = memory
    return terms


def kernel_seconds(problem: Problem, tile: TileConfig, device: Device, rates: Rates = RATES) -> float:
    """Estimated seconds of a product and its epilogue in our kernel, with this tile."""
    return _weighted(kernel_terms(problem, tile, device), rates.kernel[operand_bits(problem)])


def torch_seconds(problem: Problem, device: Device, rates: Rates = RATES) -> float:
    """Estimated seconds of a product in torch, followed by torch's pointwise passes."""
    return _weighted(torch_terms(problem, device), rates.torch[operand_bits(problem)])


def _weighted(terms: Mapping[str, float], rates: Mapping[str, float]) -> float:
    return sum(rates[name] * term for name, term in terms.items())
